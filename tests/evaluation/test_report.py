"""From workdirs to the report: what it says, what it holds, and how it refuses."""

import dataclasses
import html.parser
import importlib.util
import json
import pathlib
import re
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.commands.parser import run_main
from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.data import load_corpus
from oasis_jax.data.tokenizers import BPETokenizer
from oasis_jax.errors import UserError
from oasis_jax.evaluation import DEFINITIONS
from oasis_jax.evaluation.report.terminal import print_comparison
from oasis_jax.evaluation.runs import evaluate, unique_labels
from oasis_jax.evaluation.subjects import with_bytes
from oasis_jax.placement import make_mesh
from oasis_jax.training import manifest
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import describe
from oasis_jax.training.load import load_run
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.metrics import MetricsWriter
from oasis_jax.training.state import new_state


def write_run(workdir, config: Config, change: Callable = lambda x: x) -> None:
    """A workdir as training leaves it, with the parameters of the start, or what becomes of them."""
    workdir.mkdir()
    corpus, mesh = load_corpus(config.data, seed=config.run.seed), make_mesh(config.mesh)
    config = with_sizes(config, corpus)
    with Checkpoints(workdir, keep=Keep(1), say=print) as checkpoints:
        state = new_state(config, mesh)
        state = state._replace(params=jax.tree.map(change, state.params))
        checkpoints.save(state, step=1, data_state={}, description=describe(config, corpus))
    with MetricsWriter(workdir, step=0, tensorboard=False) as writer:
        for step in range(1, 401):
            writer.write(step, {"loss": 5 / step, "null_mass": 0.2, "first_token_mass": 0.3, "beta": 0.01})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three tiny runs: oasis and its twin on the same text, and one on the trigger task."""
    root = tmp_path_factory.mktemp("runs")
    text = "def double(x):\n    return x + x\n" * 40
    for i in range(4):
        (root / f"{i}.txt").write_text(text + f"# file {i}\n")
    data = dict(sequence_length=13, batch_size=3, holdout_fraction=0.3)
    tokens = DataConfig(corpus="files", pattern=str(root / "*.txt"), **data)
    small = dict(num_layers=2, width=12, num_heads=2, mlp_dim=10)
    write_run(root / "oasis", Config(model=ModelConfig(preset="oasis", **small), data=tokens))
    write_run(root / "twin", Config(model=ModelConfig(preset="residual", **small), data=tokens))
    vectors = ModelConfig(preset="residual", inputs="vectors", **small)
    write_run(root / "sink", Config(model=vectors, data=DataConfig(corpus="trigger", trigger_dim=3, **data)))
    return root


@pytest.fixture(autouse=True)
def where_the_texts_lie(trained, monkeypatch):
    """From elsewhere a run's stored paths are asked for."""
    monkeypatch.chdir(trained)


class Page(html.parser.HTMLParser):
    """What a page would fetch, and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.text, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [
            value for name, value in attributes if name.endswith(("src", "href", "srcset", "data")) and value
        ]

    def handle_data(self, data):
        self.text += data


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert all(value.startswith(("data:", "#")) for value in page.fetched), page.fetched
    assert not re.search("https?:", text) and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "script" not in page.tags
    return page


@pytest.fixture(scope="module")
def script():
    """eval.py as a module."""
    spec = importlib.util.spec_from_file_location("eval_script", pathlib.Path(__file__).parents[2] / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_run(trained, tmp_path, script, capsys):
    script.main(
        [
            "--workdir",
            str(trained / "oasis"),
            "--report",
            str(tmp_path / "out"),
            "--quantize=w8a8_tensor+float_head,w4a4_g32",
        ]
    )
    assert f"report: {tmp_path}/out/index.html" in capsys.readouterr().out
    page = check_self_contained((tmp_path / "out" / "index.html").read_text())
    assert page.tags.count("svg") >= 10
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    pictures = (
        "sink_mass",
        "null_mass",
        "null_mass_by_position",
        "one_head",
        "tokens_received",
        "tokens_null",
        "depth_weights",
        "inf_norm",
        "kurtosis",
        "histograms",
        "quantization",
        "training",
    )
    assert names == {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")}
    for path in (tmp_path / "out" / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"][str(trained / "oasis")]
    assert list(found["quantization"]) == ["w8a8_tensor+float_head", "w4a4_g32"]
    for scheme in found["quantization"].values():
        assert scheme["value"] == pytest.approx(scheme["float"] * (1 + scheme["relative_change"]))
        assert scheme["samples"]["sequences"] == found["metrics"]["perplexity"]["samples"]["sequences"]
    assert found["quantization"]["w4a4_g32"]["float"] == pytest.approx(
        found["metrics"]["perplexity"]["value"], rel=1e-5
    )
    for text in (
        "Quantization changes the perplexity by",
        "float, by option: head.",
        "layer*.attention.scores",
        "Always in float: ",
    ):
        assert text in page.text, text
    # The token view spells the sequence that was read.
    example = load_corpus(
        DataConfig(
            corpus="files", pattern=str(trained / "*.txt"), sequence_length=13, batch_size=3, holdout_fraction=0.3
        ),
        seed=0,
    )
    text = example.tokenizer.decode(example.heldout[0]["inputs"]).decode()
    assert "".join(found["view"]["tokens"]["text"]) == text and text.replace("\n", "\u21b5\n") in page.text


def test_three_runs_on_two_kinds_of_data(trained, tmp_path, capsys):
    workdirs = [trained / name for name in ("oasis", "twin", "sink")]
    runs = evaluate(workdirs, tmp_path, num_batches=1)
    page = check_self_contained((tmp_path / "index.html").read_text())
    assert page.tags.count("table") == 3  # what differs, and one for each kind of data
    for text in ("What differs", "model.normalizer", "tokens trained on"):
        assert text in page.text, text
    assert "n/a" in page.text and "Not applicable: this normalizer leaves nothing to a null." in page.text
    assert "are not comparable" in page.text
    print_comparison(runs)
    printed = " ".join(capsys.readouterr().out.split())
    assert "not comparable" in printed and "perplexity" in printed and "squared error" in printed

    found = json.loads((tmp_path / "metrics.json").read_text())
    assert list(found["runs"]) == [str(workdir) for workdir in workdirs]
    assert found["comparable"] == [[str(workdirs[0]), str(workdirs[1])], [str(workdirs[2])]]
    assert "corpus" in found["note"] and "tokenizer" in found["note"]
    for run in found["runs"].values():
        assert set(run["metrics"]) == set(DEFINITIONS)
        for name, metric in run["metrics"].items():
            assert {"value", "tensor", "average", "source", "samples"} <= set(metric), name
            assert metric["samples"] == {"sequences": 3, "positions": 39}
            assert ("reason" in metric) == (metric["value"] is None), name
        first, last = run["metrics"]["sink_rate"]["interval"]
        assert 0 <= first <= run["metrics"]["sink_rate"]["value"] <= last <= 1
    assert found["intervals"]["draws"] == 10_000 and "seed" in found["intervals"]
    same, *others = found["paired"]
    losses = [run["metrics"]["loss"]["value"] for run in found["runs"].values()]
    assert same["differences"]["loss"]["difference"] == pytest.approx(losses[0] - losses[1])
    assert all("cannot be paired, they differ in tokens" in pair["refused"] for pair in others)
    twin = found["runs"][str(workdirs[1])]["metrics"]
    assert twin["massive_activations"]["reason"].startswith("not measured")
    assert twin["depth_weights"]["value"] is None
    assert twin["depth_weights"]["reason"] == "not applicable: only for models with depth routers"
    assert twin["bits_per_byte"]["value"] > 0


def test_interventions_are_written_and_printed(trained, tmp_path, script, capsys):
    arguments = [
        "--workdir",
        str(trained / "oasis"),
        "--workdir",
        str(trained / "sink"),
        "--report",
        str(tmp_path),
        "--batches",
        "1",
    ]
    script.main([*arguments, "--measures", "sinks,massive", "--interventions", "evidence,softmax,begin_token"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "interventions on oasis" in printed and "begin_token" in printed
    found = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    oasis, sink = (found[str(trained / name)]["interventions"] for name in ("oasis", "sink"))
    assert [row["intervention"] for row in oasis] == ["evidence", "softmax", "begin_token"]
    assert all(
        row["interval"][0] <= row["change"] <= row["interval"][1] and row["samples"]["sequences"] == 3 for row in oasis
    )
    assert [row["reason"] is None for row in sink] == [False, False, False]
    assert found[str(trained / "oasis")]["metrics"]["massive_activations"]["value"] == 0.0
    assert found[str(trained / "oasis")]["metrics"]["loss"]["reason"].startswith("not measured")


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_diverged_model_is_measured_and_shown(trained, tmp_path, capsys, bad):
    """Nothing of it is a number; the other run's numbers, the page and the pictures of both are there."""
    config = load_run(trained / "twin").config
    write_run(tmp_path / "lost", config, lambda x: jnp.full_like(x, bad))
    runs = evaluate(
        [trained / "twin", tmp_path / "lost"], tmp_path / "out", num_batches=1,
        measures=["all"], interventions=["softmax", "sources"], quantize=["w8a8_tensor"],
    )  # fmt: skip
    print_comparison(runs)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    twin, lost = (found["runs"][str(workdir)]["metrics"] for workdir in (trained / "twin", tmp_path / "lost"))
    assert found["complete"] and twin["loss"]["value"] > 1
    assert lost["loss"]["value"] is None and lost["loss"]["reason"] == "not finite: nan"
    check_self_contained((tmp_path / "out" / "index.html").read_text())
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) > 5
    assert "left out" not in capsys.readouterr().err


def test_what_was_measured_is_shown_where_it_cannot_be_written(trained, tmp_path, monkeypatch, script, capsys):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    arguments = [f"--workdir={trained / 'twin'}", f"--report={tmp_path}", "--batches=1", "--measures=perplexity"]
    with pytest.raises(UserError, match=r"--report: cannot write '.*metrics\.json': No space left on device"):
        script.main(arguments)
    shown = capsys.readouterr()
    assert "perplexity" in shown.out and "No space left on device" in shown.err


def test_checkpoint_without_a_config(trained, tmp_path):
    shutil.copytree(trained / "twin", tmp_path / "bare")
    (file,) = (tmp_path / "bare" / "checkpoints").glob("*/metadata/metadata")
    described = json.loads(file.read_text())
    del described["config"]
    file.write_text(json.dumps(described))
    manifest.write(file.parents[1], int(file.parents[1].name), late=True)
    with pytest.raises(UserError, match="checkpoint 1 does not say its config; without that") as error:
        evaluate([tmp_path / "bare"], tmp_path / "out")
    assert "\n" not in str(error.value)


def test_runs_with_different_tokenizers_are_compared_per_byte_only(trained, tmp_path, capsys):
    config = load_run(trained / "twin").config
    data = dataclasses.replace(config.data, tokenizer="bpe", bpe_vocab_size=300)
    write_run(
        tmp_path / "bpe", dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=0), data=data)
    )
    print_comparison(evaluate([trained / "twin", tmp_path / "bpe"], tmp_path / "out", num_batches=1))
    assert "Bits per byte may be compared across tokenizers" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(found["comparable"]) == 2 and "cannot be paired, they differ in tokens" in found["paired"][0]["refused"]
    assert all(run["metrics"]["bits_per_byte"]["interval"] for run in found["runs"].values())


def test_text_of_a_corpus_that_changed_is_refused(trained, tmp_path):
    (trained / "4.txt").write_text("one more file\n" * 30)
    try:
        with pytest.raises(UserError, match=r"oasis: data: the corpus is not the one .*sha256") as error:
            evaluate([trained / "oasis"], tmp_path)
    finally:
        (trained / "4.txt").unlink()
    assert "\n" not in str(error.value)


def test_workdir_that_is_no_run(trained, tmp_path):
    with pytest.raises(UserError, match=r"^--workdir: .*nothing") as error:
        evaluate([trained / "nothing"], tmp_path)
    assert "\n" not in str(error.value)


def test_report_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--report: cannot write to '.*file': ") as error:
        evaluate([trained / "oasis"], tmp_path / "file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir", "a", "--workdir", "./a", "--report", "r"], "--workdir: 'a' is given twice"),
        (["--workdir", "nowhere", "--report", "r"], "--workdir: there is no run in 'nowhere'"),
        (["--workdir", "nowhere"], "--report"),
        (["--workdir", "a", "--report", "r", "--batch", "3"], "unknown flag --batch (did you mean '--batches'?)"),
        (["--workdir", "a", "--report", "r", "--batches", "x"], "--batches"),
        (
            ["--workdir", "a", "--report", "r", "--measures", "sink"],
            "--measures: unknown name 'sink' (did you mean 'sinks'?)",
        ),
        (
            ["--workdir", "a", "--report", "r", "--measures", ","],
            "--measures: give at least one of default, all, perplexity",
        ),
        (
            ["--workdir", "a", "--report", "r", "--interventions", "bet"],
            "--interventions: unknown name 'bet' (did you mean 'beta'?)",
        ),
        (
            ["--workdir", "a", "--report", "r", "--measures", "sinks,null_mass"],
            "'null_mass' is one of the values of 'sinks'",
        ),
        (
            ["--workdir", "a", "--report", "r", "--quantize=w8a8,w4a4_g16"],
            "unknown name 'w4a4_g16' (did you mean 'w4a4_g128'?)",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(arguments, says, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main(script.main, arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error and error.count("\n") == 1


def test_the_same_workdir_twice(tmp_path):
    with pytest.raises(UserError, match=r"^--workdir: 'x/../a' is given twice$"):
        unique_labels(["a", "b", "x/../a"])


def test_no_batches(tmp_path):
    with pytest.raises(UserError, match=r"^--batches: must be at least 1, got 0$"):
        evaluate(["a"], tmp_path, num_batches=0)


def test_labels_are_as_long_as_they_have_to_be():
    assert unique_labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert unique_labels(["one/a", "two/a"]) == ["one/a", "two/a"]


def test_bytes_of_targets_count_what_tokens_stand_for():
    tokenizer = BPETokenizer.train([b"ab ab ab"], 258)
    targets = np.arange(258)[None, ::-1]
    wanted = [[len(tokenizer.decode([int(token)])) for token in targets[0]]]
    assert with_bytes({"targets": targets}, tokenizer)["bytes"].tolist() == wanted
    assert {0, 1} <= set(wanted[0])
