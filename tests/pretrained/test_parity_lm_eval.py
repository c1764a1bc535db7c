"""The evaluation harness on a random checkpoint of an odd vocabulary: our adapter beside its own for transformers, in
float32; tasks from local files through its command line; strided perplexity beside transformers. No network.
"""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch", reason="torch is not installed; make test-parity installs it")
transformers = pytest.importorskip("transformers", reason="transformers is missing; make test-parity installs it")
pytest.importorskip("lm_eval", reason="lm-eval is not installed; make test-parity installs it")

import tokenizers  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from pretrained.against_transformers import random_checkpoint  # noqa: E402

from oasis_jax import UserError, generate, load_pretrained  # noqa: E402
from oasis_jax.commands.lm_eval import main  # noqa: E402
from oasis_jax.commands.parser import run_main  # noqa: E402
from oasis_jax.evaluation.quantization import quantized  # noqa: E402
from oasis_jax.evaluation.tasks.lm_eval import HarnessModel, generation_options  # noqa: E402
from oasis_jax.evaluation.tasks.perplexity import strided_perplexity  # noqa: E402

VOCAB, CONTEXT, BEGIN, END = 283, 61, 1, 2
SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=3e-4, bos_token_id=BEGIN, eos_token_id=END,
    pad_token_id=END,
)  # fmt: skip
WORDS = ["the", "grey", "goose", "saw", "a", "green", "field", "and", "a", "field", "of", "geese", "near", "Genève"]

ONCE = pytest.mark.parametrize("folder", ["without"], indirect=True)


def sentence(length: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


@pytest.fixture(scope="module", params=["with a begin token", "without"])
def folder(request, tmp_path_factory) -> pathlib.Path:
    """A Llama whose tokenizer puts a begin token before a text, or does not."""
    path = tmp_path_factory.mktemp("harness")
    random_checkpoint(path, "llama", seed=3, **SIZES)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB - 3,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([sentence(40, 0)], trainer)
    if request.param.startswith("with "):
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BEGIN)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(folder):
    return HarnessModel(load_pretrained(folder), batch_size=3)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, of, number) for number, of in enumerate(arguments)]


def check_close(found, wanted) -> None:
    """1e-4 + 3e-7 |log-likelihood|."""
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=3e-7)


def test_log_likelihoods_and_what_is_greedy(ours, theirs):
    pairs = [(sentence(n, n), f" {sentence(m, 50 + n)}") for n, m in ((1, 1), (3, 2), (8, 1), (2, 9), (5, 5))]
    pairs += [("", "goose"), ("", sentence(4, 7)), ("ends in spaces  ", "field"), ("two\nlines", "\nGenève")]
    pairs += [(sentence(50, 8), " goose field"), (sentence(90, 9), f" {sentence(3, 1)}")]  # over-long: cut on the left
    # What is greedy: the most likely token behind a context, for one and for two tokens.
    for seed in range(4):
        ids = ours.tok_encode(sentence(3, 100 + seed))
        (row,) = generate(ours.model, [ids], max_new_tokens=1 + seed % 2, stop_tokens=[])
        if row.text.isascii() and ours.tok_encode(sentence(3, 100 + seed) + row.text) == ids + row.tokens:
            pairs.append((sentence(3, 100 + seed), row.text))
    found = ours.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    wanted = theirs.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    check_close([nats for nats, _ in found], [nats for nats, _ in wanted])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_tokens_that_are_greedy_are_said_to_be(ours, theirs):
    """By tokens, so that no tokenizer stands between; and with one token changed they are not."""
    requests = []
    for seed in range(5):
        ids = ours.tok_encode(sentence(4, seed))
        (row,) = generate(ours.model, [ids], max_new_tokens=4, stop_tokens=[])
        other = [*row.tokens[:-1], (row.tokens[-1] + 1) % VOCAB]
        requests += [(None, ids, row.tokens), (None, ids, other)]
    found, wanted = (model._loglikelihood_tokens(requests, disable_tqdm=True) for model in (ours, theirs))
    check_close([nats for nats, _ in found], [nats for nats, _ in wanted])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] == [True, False] * 5


def test_rolling_log_likelihoods(ours, theirs):
    texts = [("goose",), (sentence(9, 1),), (sentence(60, 2),), (f"{sentence(150, 3)}\nGenève",)]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    check_close(found, theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True))
    assert found[3] < found[2] < found[1] < 0


def test_generations(ours, theirs):
    """Greedy, in two groups of options, contexts too long among them, and a stop string that comes."""
    short, stopped = {"until": ["\n\n"], "max_gen_toks": 12}, {"until": ["</s>", "qqq"], "max_gen_toks": 17}
    contexts = [sentence(n, n) for n in (1, 9, 4, 70, 2)]
    asked = [(context, options) for options in (short, stopped) for context in contexts]
    found = ours.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert found == theirs.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert len(set(found)) > 5
    letter = next(letter for letter in found[0][2:] if letter.isascii())
    cut = [(contexts[0], {"until": [letter], "max_gen_toks": 12})]
    (text,) = ours.generate_until(instances("generate_until", *cut), disable_tqdm=True)
    assert text == found[0].split(letter)[0] != found[0]


def test_generations_token_by_token(ours, theirs):
    for seed in range(3):
        ids = ours.tok_encode(sentence(2 + 3 * seed, seed))
        (row,) = generate(ours.model, [ids], max_new_tokens=20)
        options = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        wanted = theirs.model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        assert row.tokens == [token for token in wanted if token != END]


def test_what_is_drawn_follows_the_seed_and_the_request(ours):
    asked = instances("generate_until", *[("the grey", {"do_sample": True, "temperature": 5.0, "max_gen_toks": 9})] * 3)
    found = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        found.append(ours.generate_until(asked, disable_tqdm=True))
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 3


def test_log_likelihoods_of_a_quantized_model(ours):
    """What its own numerics say, with the padding of a batch and alone."""
    model = quantized(ours.model, "w4a4_g32")
    pairs = instances("loglikelihood", *[(sentence(n, n), " goose") for n in (2, 30, 5)])
    found = HarnessModel(model, batch_size=3).loglikelihood(pairs, disable_tqdm=True)
    alone = [HarnessModel(model, batch_size=1).loglikelihood([one], disable_tqdm=True)[0] for one in pairs]
    check_close([nats for nats, _ in found], [nats for nats, _ in alone])
    plain = ours.loglikelihood(pairs, disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, plain)) > 1e-2


CHOICES = """task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATED = """task: local_generated
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "goose"
generation_kwargs: {until: ["zz"], max_gen_toks: 11}
metric_list: [{metric: exact_match}]
"""
TASKS = {"choices": CHOICES, "rolling": ROLLING, "generated": GENERATED}


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> pathlib.Path:
    """Three tasks from local files, and caches of the data library that nothing else has written."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    choices = [
        {
            "question": sentence(4 + n, n),
            "choices": [f" {sentence(2, 30 + 7 * n + c)}" for c in range(3)],
            "label": n % 3,
        }
        for n in range(7)
    ]
    texts = [{"text": sentence(n, n)} for n in (5, 90, 12, 3)]
    for name, lines in (("choices", choices), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@ONCE
def test_the_example_of_the_documentation_runs_as_it_is_shown(folder, tasks):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    example, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    manager = TaskManager(include_path=str(tasks))
    names = dict(model=load_pretrained(folder), tasks=["local_choices"], task_manager=manager)
    exec(compile(example, "docs/benchmarks.md", "exec"), names)
    assert 0 <= names["results"]["results"]["local_choices"]["acc,none"] <= 1


def numbers(sample: dict) -> list[float]:
    """The log-likelihoods of a sample, beside which the harness keeps what is greedy."""
    kept = [value for response in sample["resps"] for value in np.ravel(np.asarray(response, object))]
    return [float(value) for value in kept if str(value) not in ("True", "False")]


def samples_of(out: pathlib.Path, task: str) -> list[dict]:
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


@ONCE
def test_the_command_line_on_tasks_from_local_files(folder, theirs, tasks, capsys):
    names = [f"local_{name}" for name in TASKS]
    flags = [f"--include_path={tasks}", f"--output_path={tasks}/out", "--log_samples"]
    main([f"--model={folder}", f"--tasks={','.join(names)}", "--batch-size=3", *flags])
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    manager = TaskManager(include_path=str(tasks))
    wanted = simple_evaluate(model=theirs, tasks=names, task_manager=manager, bootstrap_iters=0)
    (results,) = (tasks / "out").rglob("results_*.json")
    results = json.loads(results.read_text())
    assert results["config"]["model"] == "oasis_jax" and str(folder) in json.dumps(results["config"])
    for name in names:
        for metric, value in wanted["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert results["results"][name][metric] == pytest.approx(value, rel=1e-5), metric
        found = samples_of(tasks / "out", name)
        others = sorted(wanted["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(found) == len(others) > 3
        for one, other in zip(found, others):
            if name == "local_generated":
                assert one["resps"] == other["resps"]
            else:
                check_close(numbers(one), numbers(other))
    everything = [x for name in names for sample in samples_of(tasks / "out", name) for x in [sample["resps"]]]
    assert len(everything) == 7 + 4 + 4


@ONCE
def test_mistakes_are_one_line(folder, tasks, capsys):
    cases = [
        ([], "the following arguments are required: --tasks"),
        (["--tasks=hellaswagg"], "did you mean 'hellaswag'"),
        (["--tasks=local_rolling", "--quantise=w8a8"], "did you mean '--quantize'"),
        (["--tasks=local_rolling", "--model_args=dtype=float64"], "--model_args"),
        (["--tasks=local_rolling", "--batch_size=auto"], "--batch-size"),
        (["--tasks=local_rolling", "--log_samples"], "Specify --output_path"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as exit:
            run_main(main, [f"--model={folder}", f"--include_path={tasks}", *arguments], "oasis_jax lm-eval")
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2 and message in said and said.startswith("oasis_jax lm-eval: error:"), (
            message,
            said,
        )


@ONCE
def test_models_that_the_harness_cannot_ask_say_so(folder):
    for described, message in [
        (dict(sources=str(folder)), "did you mean 'source'"),
        (dict(dtype="float32"), "source is missing"),
        (dict(source=str(folder), quantize="w8a9"), "did you mean 'w8a8'"),
        (dict(source=str(folder), max_length=62), "max_length must be 2 to 61, got 62"),
        (dict(source=str(folder), begin_token="283"), "the number of a token below 283"),
    ]:
        with pytest.raises(UserError, match=message):
            HarnessModel.create_from_arg_obj(described, {"batch_size": 2, "device": "cpu"})
    with pytest.raises(UserError, match="batch_size must be a number from 1 on, got 'auto'"):
        HarnessModel.create_from_arg_obj(dict(source=str(folder)), {"batch_size": "auto"})
    found = HarnessModel.create_from_arg_string(f"source={folder},begin_token=none,max_length=33")
    assert (found.max_length, found.batch_size, found.prefix_token_id) == (33, 8, BEGIN)
    with pytest.raises(UserError, match="came without a tokenizer"):
        HarnessModel(found.model.replace(tokenizer=None))
    with pytest.raises(UserError, match="a continuation of 34 tokens does not fit into the 33"):
        found._loglikelihood_tokens([(None, [5], [7] * 34)])
    with pytest.raises(UserError, match="33 new tokens leave no room for a context in 33 tokens"):
        found._generate(["a"], {"max_gen_toks": 33}, [0])
    with pytest.raises(UserError, match="unknown name 'num_beams'"):
        found._generate(["a"], {"num_beams": 3}, [0])
    with pytest.raises(UserError, match="came without a chat template"):
        found.chat_template(True)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_chats(folder, tmp_path):
    """Texts, tokens and what is generated, beside the harness' adapter, also where an answer is to be continued."""
    path = tmp_path / "chat"
    shutil.copytree(folder, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=3)
    ours = HarnessModel(load_pretrained(path), batch_size=3)
    assert ours.chat_template(True) == TEMPLATE == theirs.chat_template(True)
    chats = [
        ([{"role": "system", "content": "a goose"}, {"role": "user", "content": sentence(5, 1)}], True),
        ([{"role": "user", "content": sentence(3, 2)}, {"role": "assistant", "content": "near"}], False),
    ]
    for messages, answer in chats:
        text = theirs.apply_chat_template(messages, add_generation_prompt=answer)
        assert ours.apply_chat_template(messages, add_generation_prompt=answer) == text
        assert ours.tok_encode(text) == theirs.tokenizer.encode(text, add_special_tokens=False)
        assert ours.tok_encode(text)[0] == BEGIN
    with pytest.raises(UserError, match="only the model's own is known, not 'rag'"):
        ours.chat_template("rag")


def test_what_a_task_says_about_generation():
    stop, new, sampling = generation_options({"until": ["a", ""], "temperature": 0.7, "top_k": 5.0})
    assert (stop, new) == (["a"], 256) and (sampling.temperature, sampling.top_k) == (0.7, 5)
    assert generation_options({"until": "b", "do_sample": False, "temperature": 0.7, "max_tokens": 3})[2].greedy
    with pytest.raises(UserError, match="needs a temperature above 0"):
        generation_options({"do_sample": True})


@pytest.mark.parametrize(("window", "stride"), [(61, 17), (40, 40), (9, 1)])
def test_strided_perplexity(folder, theirs, window, stride):
    """transformers' strided loop, the sum of nats over the tokens that count."""
    text = f"{sentence(70, 4)}\nGenève"
    ids = torch.tensor([theirs.tokenizer.encode(text)])
    total, count, before = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        stop = min(start + window, ids.shape[1])
        inputs = ids[:, start:stop]
        labels = inputs.clone()
        labels[:, : -(stop - before)] = -100
        counted = int((labels[:, 1:] != -100).sum())
        if counted:
            with torch.no_grad():
                total += float(theirs.model(inputs, labels=labels).loss.double()) * counted
        count, before = count + counted, stop
        if stop == ids.shape[1]:
            break
    found = strided_perplexity(load_pretrained(folder), text, window=window, stride=stride)
    assert found["tokens"] == count
    assert found["nats"] / count == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
