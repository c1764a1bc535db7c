"""fit() and train.py: what a run writes, how it goes on, how it stops."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import forward
from oasis_jax.training import loop
from oasis_jax.training.loop import TrainingStopped, fit
from oasis_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

def get_config():
    return Config(
        model=ModelConfig(preset="oasis", num_layers=1, width=14, num_heads=1, mlp_dim=22),
        data=DataConfig(corpus="files", pattern="{pattern}", sequence_length=9, batch_size=5, holdout_fraction=0.2),
        optimizer=OptimizerConfig(warmup_steps=6),
        run=RunConfig(
            steps=12, log_interval=2, telemetry_interval=5, eval_interval=6, checkpoint_interval=5, keep_checkpoints=9
        ),
    )
"""


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(f"{i * k % 97} pears" for k in range(60)))
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def config(pattern) -> Config:
    names = {}
    exec(CONFIG.format(pattern=pattern), names)
    return names["get_config"]()


def evaluate(params, config, placement, batches):
    """The rows that there are, the model's mean output, and what cannot be logged."""
    rows = sum(len(batch["inputs"]) for batch in batches)
    outputs, _ = forward(params, config, batches[0]["inputs"], Context(placement=placement))
    return {
        "rows": rows,
        "output": float(outputs.mean()),
        "table": [1.0],
        "none": None,
        "endless": float("inf"),
    }


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    workdir = tmp_path_factory.mktemp("runs") / "deep" / "run"
    return workdir, fit(config, workdir, evaluators={"own": evaluate})


@pytest.fixture
def stopped_at_5(finished, tmp_path) -> pathlib.Path:
    """The run as it was after its first checkpoint, with lines behind it, as after a kill."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for step in (10, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def without_clock(workdir):
    return [
        {k: v for k, v in line.items() if not k.endswith(("time", "_per_second", "_seconds", "_share"))}
        for line in read_metrics(workdir)
    ]


def set_fields(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def test_what_a_run_writes(finished):
    workdir, returned = finished
    lines = {line["step"]: line for line in read_metrics(workdir)}
    assert list(lines) == [2, 4, 5, 6, 8, 10, 12]
    assert returned == lines[12]
    always = {
        "step",
        "loss",
        "grad_norm",
        "parameter_norm",
        "learning_rate",
        "time",
        "tokens_per_second",
        "step_seconds",
    }
    always |= {"data_share", "transfer_share", "device_share"}
    assert set(lines[2]) == set(lines[8]) == always
    telemetry = {"null_mass", "null_mass/layer0", "first_token_mass", "first_token_mass/layer0"}
    assert set(lines[5]) == set(lines[10]) == always | telemetry | {"beta", "beta/layer0.attention", "beta/layer0.mlp"}
    assert set(lines[6]) == set(lines[12]) == always | {"eval/rows", "eval/output"}
    assert lines[6]["eval/rows"] == 8 * 5
    assert all(np.isfinite(value) for line in lines.values() for value in line.values())
    assert lines[12]["loss"] < lines[2]["loss"]
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [5, 10, 12]


def test_a_finished_run_stays_as_it_is(config, finished, capsys):
    workdir, returned = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert fit(config, workdir) == returned
    assert "has all its 12 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_resuming_with_other_intervals_changes_no_loss(config, finished, stopped_at_5, capsys):
    asked = set_fields(config, "run", telemetry_interval=0, checkpoint_interval=100, eval_interval=0)
    fit(asked, stopped_at_5)
    assert "resumed at step 5" in capsys.readouterr().err
    expected = {line["step"]: line for line in without_clock(finished[0])}
    found = without_clock(stopped_at_5)
    assert [line["step"] for line in found] == [2, 4, 5, 6, 8, 10, 12]
    for line in found:
        assert line == {name: expected[line["step"]][name] for name in line}
    assert sorted(int(path.name) for path in (stopped_at_5 / "checkpoints").iterdir()) == [5, 12]


def poison(monkeypatch, name):
    """From step 7 on, `name` of the step's metrics is not finite. No step is really made."""

    def make_step(config, mesh):
        def step(state, batch):
            number = int(state.step) + 1
            metrics = dict.fromkeys(("loss", "grad_norm", "parameter_norm", "learning_rate"), jnp.float32(number))
            return state._replace(step=jnp.int32(number)), metrics | (
                {name: jnp.float32(jnp.nan)} if number >= 7 else {}
            )

        step.lower = lambda state, batch: SimpleNamespace(compile=lambda: step)
        return step

    monkeypatch.setattr(loop, "make_step", make_step)


@pytest.mark.parametrize(
    "name, words", [("loss", "the loss"), ("grad_norm", "the gradient"), ("parameter_norm", "a parameter")]
)
def test_a_run_that_is_no_longer_finite_stops(config, stopped_at_5, monkeypatch, name, words):
    poison(monkeypatch, name)
    asked = set_fields(config, "run", telemetry_interval=0, checkpoint_interval=4)
    with pytest.raises(TrainingStopped) as error:
        fit(asked, stopped_at_5)
    folder = stopped_at_5 / "checkpoints"
    assert (
        str(error.value)
        == f"step 7: {words} is not finite ({name} = nan); stopped, the last good checkpoint is step 5 in {folder}"
    )
    assert [line["step"] for line in read_metrics(stopped_at_5)] == [2, 4, 5, 6]
    assert [path.name for path in folder.iterdir()] == ["5"]


def test_a_learning_rate_that_is_too_high(config, tmp_path):
    """The real step: parameters overflow float32 at once, and nothing is saved."""
    asked = set_fields(
        set_fields(config, "optimizer", learning_rate=1e30, warmup_steps=0),
        "run",
        checkpoint_interval=1,
        telemetry_interval=0,
    )
    with pytest.raises(
        TrainingStopped,
        match=r"step 1: a parameter is not finite \(parameter_norm = inf\); stopped, there is no checkpoint yet",
    ):
        fit(asked, tmp_path)
    assert read_metrics(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_few_steps_are_on_their_way_at_a_time(config, tmp_path, monkeypatch):
    """Where nothing is logged nothing else waits for a device; see tests/faults for what happens without a bound."""
    dispatched, awaited, ahead = [], [], []
    compiled, wait = loop.Preemption.compiled, jax.block_until_ready

    def counted(self, lower):
        program = compiled(self, lower)

        def step(*arguments):
            dispatched.append(True)
            ahead.append(len(dispatched) - len(awaited))
            return program(*arguments)

        return step if len(lower.args) == 2 else program  # the training step's state and batch, not what makes a state

    def waited(x):
        awaited.extend([True] if isinstance(x, dict) else [])
        return wait(x)

    monkeypatch.setattr(loop.Preemption, "compiled", counted)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    rare = dict(log_interval=100, telemetry_interval=0, eval_interval=0, checkpoint_interval=100)
    fit(set_fields(config, "run", steps=9, **rare), tmp_path)
    assert len(dispatched) == 9 and max(ahead) == 3


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints_broken"])
@pytest.mark.parametrize("make", [pathlib.Path.touch, os.mkfifo], ids=["file", "FIFO"])
def test_what_should_be_a_folder_and_is_none_is_named(config, tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"--workdir: '.*/{name}' is no folder; remove it") as error:
        fit(config, tmp_path)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == [name]


def test_another_corpus_in_the_same_place(config, stopped_at_5, pattern, tmp_path):
    moved = shutil.copytree(pathlib.Path(pattern).parent, tmp_path / "moved")
    (moved / "4.txt").write_text("other " * 60)
    with pytest.raises(UserError, match="the corpus is not the one this run was trained on"):
        fit(set_fields(config, "data", pattern=f"{moved}/*.txt"), stopped_at_5)
    assert len(read_metrics(stopped_at_5)) == 7


@pytest.mark.parametrize(
    "config, message",
    [
        (
            Config(model=ModelConfig(vocab_size=300)),
            r"model\.vocab_size: 300 asked for, but the bytes tokenizer has 258; leave it at 0",
        ),
        (
            Config(model=ModelConfig(inputs="vectors", vector_dim=5), data=DataConfig(corpus="trigger", trigger_dim=7)),
            r"model\.vector_dim: 5 asked for, but the corpus trigger has 9; leave it at 0",
        ),
    ],
    ids=["tokens", "vectors"],
)
def test_a_size_that_the_data_does_not_have(config, message, pattern, tmp_path):
    if config.model.inputs == "tokens":
        config = set_fields(config, "data", corpus="files", pattern=pattern, sequence_length=9)
    with pytest.raises(UserError, match=message):
        fit(config, tmp_path)


def test_a_workdir_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", pathlib.Path("/proc/run")):
        with pytest.raises(UserError, match=r"--workdir: cannot write to '.*': "):
            fit(config, workdir)


def test_nothing_is_written_for_a_mesh_that_cannot_be(config, tmp_path):
    with pytest.raises(
        UserError, match=f"mesh: data=640 x fsdp=1 x tensor=1 needs 640 devices, there are {len(jax.devices())}"
    ):
        fit(set_fields(config, "mesh", data=640), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The command


def command(pattern, tmp_path, *arguments):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(pattern=pattern))
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "train.py", f"--config={path}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_mistakes_are_one_line_and_exit_code_2(pattern, tmp_path, stopped_at_5):
    short = tmp_path / "short.txt"
    short.write_text("hi")
    for arguments, message in [
        (
            (f"--workdir={stopped_at_5}", "--set", "model.width=16"),
            "holds a run with another config: model.width is 14 there, 16 now",
        ),
        ((f"--workdir={tmp_path / 'config.py'}",), "cannot write to"),
        # Ends after the checkpoints are opened and before anything is saved: no thread may be left behind.
        ((f"--workdir={tmp_path / 'short'}", "--set", f"data.pattern={short}"), "use a corpus of about"),
        (
            (f"--workdir={tmp_path / 'new'}", "--set", "data.batch_size=7", "--set", "optimizer.accumulation_steps=2"),
            "does not divide",
        ),
    ]:
        done = command(pattern, tmp_path, *arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("train.py: error: ")
        assert message in line


@pytest.mark.slow
def test_the_command_trains_and_evaluates(pattern, tmp_path):
    done = command(pattern, tmp_path, f"--workdir={tmp_path / 'run'}", "--set", "run.steps=6")
    assert done.returncode == 0, done.stderr
    assert "oasis: " in done.stderr
    assert "step 6/6  loss " in done.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["eval/perplexity"] > 1
