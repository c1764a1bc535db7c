"""`oasis_jax generate`: one text as it is made, several at once, and what it refuses."""

import numpy as np
import pytest
import tokenizers
from pretrained.tiny import CONFIG, write

from oasis_jax import generate, load_pretrained
from oasis_jax.commands.generate import main
from oasis_jax.commands.parser import run_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of words."""
    path = write(tmp_path_factory.mktemp("generate") / "llama")
    words = {f"w{i}": i for i in range(CONFIG["vocab_size"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("prompts", [["w7 w9"], ["w7 w9", "w4"]], ids=["one", "several"])
def test_texts_are_those_of_the_library(folder, prompts, capsys):
    main([*prompts, f"--model={folder}", "--max-new-tokens=5"])
    found = generate(load_pretrained(folder), prompts, max_new_tokens=5)
    said = capsys.readouterr().out
    assert said.split() == "".join(f"{prompt}{row.text}\n" for prompt, row in zip(prompts, found)).split()
    assert all(len(row.tokens) == 5 for row in found)


def test_what_is_drawn_follows_the_seed(folder, capsys):
    texts = []
    for seed in (1, 1, 2):
        main(["w7", f"--model={folder}", "--max-new-tokens=8", "--temperature=50", f"--seed={seed}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert np.unique(texts).size == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["w1"], "one of the arguments --model --workdir is required"),
        (["w1", "--model=/nowhere/at/all"], "no such folder or file"),
        (["w1", "--model=FOLDER", "--temperature=-1"], "sampling.temperature: must be at least 0, got -1.0"),
        (["w1", "--model=FOLDER", "--top-p=0"], "sampling.top_p: must be above 0 and not above 1, got 0.0"),
        (["w1", "--model=FOLDER", "--temperature=cold"], "--temperature"),
        (["w1", "--model=FOLDER", "--kv-cache=int9"], "kv_cache: unknown name 'int9' (did you mean 'int8'?)"),
        (["w1", "--model=FOLDER", "--max-new-tokens=0"], "max_new_tokens must be at least 1, got 0"),
        (["w1", "--model=FOLDER", "--top-k=-2"], "sampling.top_k: must be at least 0, got -2"),
        (["w1", "--model=FOLDER", "--stop="], "a stop string is empty"),
        (["", "--model=FOLDER"], "prompt 0 is empty"),
        (["w1", "--model=FOLDER", "--max-new-tokens=64"], "are 65 together, but the model was made for 64"),
        (["w1", "--model=FOLDER", "--set=mesh.sequence=2"], "mesh.sequence cannot be set here; allowed: mesh.data"),
        (["w1", "--model=FOLDER", "--max-tokens=3"], "unknown flag --max-tokens"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run_main(main, [x.replace("FOLDER", str(folder)) for x in arguments], "oasis_jax generate")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said and said.count("\n") == 1
