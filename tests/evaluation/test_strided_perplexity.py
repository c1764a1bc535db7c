"""Perplexity in strided windows: which token is scored in which window, and what the sums mean."""

import json
import pathlib
import re

import numpy as np
import pytest
import tokenizers
from model import oracle
from pretrained.tiny import CONFIG, random_model, write

from oasis_jax import ModelConfig, UserError, load_pretrained
from oasis_jax.commands.parser import run_main
from oasis_jax.commands.perplexity import main
from oasis_jax.data.tokenizers import BPETokenizer, BytesTokenizer
from oasis_jax.evaluation import evaluate_model
from oasis_jax.evaluation.measures.perplexity import PERPLEXITY
from oasis_jax.evaluation.tasks.perplexity import DEFINITIONS, strided_perplexity, summary, windows_of
from oasis_jax.model.layout import unstack_layers

TEXT = "Three grey geese\n in a green field grazing,  né à Genève.\n"  # two bytes for é, è and à each


def by_hand(count: int, window: int, stride: int, begin: bool, every: bool) -> dict[int, list[int]]:
    """Of every token that counts the tokens before it that its window shows, -1 for the begin token: from the first
    window that holds the token, and only where something is before it.
    """
    line = [-1] * (begin and not every) + list(range(count))
    room, found, start = window - every, {}, 0
    while True:
        shown = [-1] * every + line[start : start + room]
        for place, token in enumerate(shown):
            if token >= 0 and place and token not in found:
                found[token] = shown[:place]
        if start + room >= len(line):
            return found
        start += stride


@pytest.mark.parametrize("begin_at", ["none", "text", "windows"])
@pytest.mark.parametrize(
    ("count", "window", "stride"), [(23, 7, 3), (23, 7, 7), (23, 8, 1), (5, 9, 4), (14, 7, 6), (1, 4, 2), (2, 2, 1)]
)
def test_every_token_is_scored_once_with_the_context_of_its_window(count, window, stride, begin_at):
    every = begin_at == "windows"
    stride = min(stride, window - every)
    begin = None if begin_at == "none" else 99
    rows, counted = windows_of(np.arange(count), window, stride, begin, begin_at if begin else "text")
    found = {}
    for row in rows:
        for place in range(len(row.tokens) - row.scored, len(row.tokens)):
            found[row.tokens[place]] = [-1 if token == 99 else token for token in row.tokens[:place]]
        assert len(row.tokens) <= window
    wanted = by_hand(count, window, stride, begin is not None, every)
    assert found == wanted and list(counted) == sorted(found) and len(counted) == sum(row.scored for row in rows)
    if every or stride < window:
        assert sorted(found) == list(range(begin is None, count))


def model(tokenizer, begin_token=None, **fields):
    sizes = dict(width=24, num_heads=4, num_layers=2, mlp_dim=20, vocab_size=tokenizer.vocab_size, context_length=40)
    return random_model(ModelConfig(**(sizes | dict(preset="residual") | fields)), begin_token=begin_token).replace(
        tokenizer=tokenizer
    )


def nats(model, ids: list[int], scored: int) -> float:
    """Of the last tokens of a row, by numpy."""
    logits = oracle.forward(unstack_layers(model.params), model.config, np.asarray([ids[:-1]]))["logits"][0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logprobs[np.arange(len(ids) - 1), ids[1:]][-scored:].sum()


def test_the_sum_is_that_of_the_rows_by_numpy():
    begun = model(BytesTokenizer(), begin_token=256)
    found = strided_perplexity(begun, TEXT, window=17, stride=5)
    ids = [256, *TEXT.encode()]
    parts, done = [], 1
    for start in range(0, len(ids), 5):
        stop = min(start + 17, len(ids))
        parts.append(nats(begun, ids[start:stop], stop - done))
        done = stop
        if stop == len(ids):
            break
    size, words = len(TEXT.encode()), 11
    assert set(found) == set(DEFINITIONS)
    assert found["nats"] == pytest.approx(sum(parts), rel=1e-5)
    assert (found["tokens"], found["bytes"], found["words"]) == (size, size, words)
    assert found["perplexity"] == found["byte_perplexity"] == pytest.approx(np.exp(sum(parts) / size), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(np.exp(sum(parts) / words), rel=1e-3)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    import jax

    tokenizer = BPETokenizer.train([TEXT.encode() * 3], 277)
    flat = model(tokenizer)
    flat = flat.replace(params=jax.tree.map(np.zeros_like, flat.params))
    found, count = strided_perplexity(flat, TEXT, window=9, stride=4), len(tokenizer.encode(TEXT))
    first = len(tokenizer.decode(tokenizer.encode(TEXT)[:1]))
    size, bits = len(TEXT.encode()), np.log2(277)
    assert (found["tokens"], found["bytes"]) == (count - 1, size - first)
    assert found["perplexity"] == pytest.approx(277, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(bits * (count - 1) / (size - first), rel=1e-5)


def test_words_and_bytes():
    found = summary(nats=30.0, tokens=15, counted_bytes=40, text_bytes=48, words=6)
    assert found["bits_per_byte"] == pytest.approx(0.75 / np.log(2))
    assert found["perplexity"] == pytest.approx(np.exp(2)) and found["byte_perplexity"] == pytest.approx(np.exp(0.75))
    assert found["word_perplexity"] == pytest.approx(np.exp(6.0))  # .75 nats a byte, 8 bytes a word
    assert summary(1e6, 1, 1, 1, 1)["perplexity"] == np.inf


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bits_per_byte_are_those_of_the_measures(kind):
    """One definition: on the same tokens the measure of a report says the same."""
    tokenizer = BytesTokenizer() if kind == "bytes" else BPETokenizer.train([TEXT.encode() * 3], 277)
    one, ids = model(tokenizer), tokenizer.encode(TEXT)[None]
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())
    assert not tokenizer.byte_lengths[[tokenizer.begin_id, tokenizer.separator_id]].any()
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "bytes": tokenizer.byte_lengths[ids[:, 1:]]}
    one = one.replace(config=ModelConfig(**(vars(one.config) | dict(context_length=0))))
    found = strided_perplexity(one, TEXT, window=ids.size, stride=1)
    measured = evaluate_model(one.decoder(), [batch], {"perplexity": PERPLEXITY})
    for name in ("bits_per_byte", "perplexity"):
        assert found[name] == pytest.approx(measured[name], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=41, stride=3), "window is 41, but the model was made for 40"),
        (dict(window=1, stride=1), "window must be at least 2, got 1"),
        (dict(window=8, stride=9), "stride must be 1 to 8, what a window holds of the text, got 9"),
        (dict(window=8, stride=8, begin_at="windows"), "stride must be 1 to 7"),
        (dict(window=8, stride=0), "stride must be 1 to 8"),
        (dict(window=8, stride=2, begin_at="window"), "did you mean 'windows'"),
    ],
)
def test_windows_that_cannot_be_say_so(options, message):
    with pytest.raises(UserError, match=message):
        strided_perplexity(model(BytesTokenizer(), begin_token=256), TEXT, **options)


def test_texts_that_cannot_be_scored_say_so():
    with pytest.raises(UserError, match="the text has 1 tokens; none has a token before it"):
        strided_perplexity(model(BytesTokenizer()), "a", window=8, stride=4)
    with pytest.raises(UserError, match="the text has 0 tokens"):
        strided_perplexity(model(BytesTokenizer(), begin_token=256), "", window=8, stride=4)
    with pytest.raises(UserError, match="came without"):
        strided_perplexity(model(BytesTokenizer()).replace(tokenizer=None), TEXT, window=8, stride=4)


def test_the_example_of_the_documentation_runs_as_it_is_shown(capsys):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)  # the first needs the harness
    names = dict(model=model(BytesTokenizer()), text=TEXT)
    exec(compile(example, "docs/benchmarks.md", "exec"), names)
    said = capsys.readouterr().out
    assert [line.partition(":")[0] for line in said.splitlines()] == list(names["found"])
    assert names["found"] == strided_perplexity(names["model"], TEXT, window=32, stride=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of words, and a text."""
    path = write(tmp_path_factory.mktemp("perplexity") / "llama")
    words = {f"w{i}": i for i in range(CONFIG["vocab_size"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(path / "tokenizer.json"))
    (path / "text.txt").write_text(" ".join(f"w{i * 7 % 200}" for i in range(50)))
    (path / "latin.txt").write_bytes(b"caf\xe9")
    return path


def test_the_command_says_what_the_library_finds(folder, capsys):
    out = folder / "found.json"
    main([f"--model={folder}", f"--text={folder}/text.txt", "--window=16", "--stride=4", f"--out={out}"])
    wanted = strided_perplexity(load_pretrained(folder), (folder / "text.txt").read_text(), window=16, stride=4)
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["perplexity"] == wanted["perplexity"] and written["stride"] == 4 and written["tokens"] == 49
    assert said.startswith(f"perplexity {wanted['perplexity']:.4f} per token, ") and said.count("\n") == 1
    main([f"--model={folder}", f"--text={folder}/text.txt", "--window=16", "--stride=4", "--begin-token=7"])
    begun = strided_perplexity(
        load_pretrained(folder).replace(begin_token=7), (folder / "text.txt").read_text(), window=16, stride=4
    )
    said = capsys.readouterr().out
    assert f"perplexity {begun['perplexity']:.4f}" in said and "50 tokens" in said and "begin token 7 at text" in said


def test_the_command_takes_a_scheme(folder, capsys):
    main([f"--model={folder}", f"--text={folder}/text.txt", "--window=16", "--stride=4", "--quantize=w4a4_g32"])
    said = float(capsys.readouterr().out.split()[1])
    wanted = strided_perplexity(load_pretrained(folder), (folder / "text.txt").read_text(), window=16, stride=4)
    assert abs(said / wanted["perplexity"] - 1) > 1e-3  # rounding to 4 bits shows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text=FOLDER/text.txt"], "one of the arguments --model --workdir is required"),
        (["--model=FOLDER"], "--text"),
        (["--model=FOLDER", "--text=FOLDER/no.txt"], "--text: cannot read"),
        (["--model=FOLDER", "--text=FOLDER/latin.txt"], "is not UTF-8 at byte 3"),
        (["--model=FOLDER", "--text=FOLDER/text.txt", "--quantize=w8a9"], "did you mean 'w8a8'"),
        (["--model=FOLDER", "--text=FOLDER/text.txt", "--begin-token=211"], "the number of a token below 211"),
        (["--model=FOLDER", "--text=FOLDER/text.txt", "--dtype=float8"], "--dtype: must be float32 or bfloat16"),
        (["--model=FOLDER", "--text=FOLDER/text.txt", "--out=FOLDER/none/x.json"], "--out: cannot write"),
        (["--model=FOLDER", "--text=FOLDER/text.txt", "--out=FOLDER/kept.json", "--begin-at=start"], "unknown name"),
        (["--model=FOLDER", "--text=FOLDER/text.txt", "--set=mesh.sequence=2"], "mesh.sequence cannot be set here"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message, capsys):
    (folder / "kept.json").write_text("of an earlier run")
    asked = [x.replace("FOLDER", str(folder)) for x in arguments]
    with pytest.raises(SystemExit) as exit:
        run_main(main, [*asked, "--window=16", "--stride=4"], "oasis_jax perplexity")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said and said.count("\n") == 1
    assert (folder / "kept.json").read_text() == "of an earlier run"
