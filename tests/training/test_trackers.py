"""Where else numbers go: TensorBoard files are in test_training_metrics.py; Weights & Biases here, offline."""

import json
import sys
from types import SimpleNamespace

import pytest

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.errors import Preempted, UserError
from oasis_jax.training.loop import fit
from oasis_jax.training.metrics import MetricsWriter, read_metrics
from oasis_jax.training.trackers import RUN_ID

CONFIG = Config(model=ModelConfig(width=132, num_heads=6))


class FakeRun:
    def __init__(self, given):
        self.given, self.lines, self.code, self.preempting = given, [], None, False

    def log(self, values, step):
        self.lines.append((step, values))

    def mark_preempting(self):
        self.preempting = True

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def runs(monkeypatch) -> list[FakeRun]:
    """wandb in place of which every run only remembers what it was given."""
    made = []

    def init(**given):
        made.append(FakeRun(given))
        return made[-1]

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    fake = SimpleNamespace(init=init, Settings=lambda **given: given, errors=errors)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return made


def write(workdir, *steps, error=None):
    with MetricsWriter(workdir, step=steps[0] - 1, wandb=CONFIG) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.5, "eval/loss": float("nan")})
        if error:
            raise error


def test_a_resumed_run_goes_on_under_its_id(runs, tmp_path):
    write(tmp_path, 1, 2)
    write(tmp_path, 3)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", 1)
    first, second, other = (run.given["id"] for run in runs)
    assert first == second != other
    assert all(run.given["resume"] == "allow" and run.code == 0 for run in runs)
    assert [step for step, _ in runs[0].lines + runs[1].lines] == [1, 2, 3]
    assert runs[0].lines[0][1]["loss"] == 1.5 and runs[0].given["config"]["model"]["width"] == 132


def test_how_a_run_ended_is_told(runs, tmp_path):
    with pytest.raises(Preempted):
        write(tmp_path, 1, error=Preempted("told to end"))
    with pytest.raises(RuntimeError):
        write(tmp_path, 2, error=RuntimeError("broken"))
    assert [(run.code, run.preempting) for run in runs] == [(1, True), (1, False)]


def test_what_wandb_refuses_is_one_line(runs, tmp_path, monkeypatch):
    def refuse(**given):
        raise sys.modules["wandb"].errors.Error("No API key configured.\nUse wandb login")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(
        UserError, match=r"^run\.wandb: No API key configured\.; `wandb login`, WANDB_MODE=offline [^\n]*$"
    ):
        MetricsWriter(tmp_path, step=0, wandb=CONFIG)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"run\.wandb: wandb is not installed.*oasis_jax\[wandb\]"):
        MetricsWriter(tmp_path, step=0, wandb=CONFIG)


@pytest.mark.parametrize("text", ["", "a/b", "../x", "x" * 65, "two words"])
def test_an_id_of_another_hand_is_refused(runs, tmp_path, text):
    (tmp_path / RUN_ID).write_text(text)
    with pytest.raises(UserError, match=f"{RUN_ID}: holds no id of a run"):
        MetricsWriter(tmp_path, step=0, wandb=CONFIG)
    assert not runs


@pytest.mark.slow
def test_training_logs_what_metrics_hold(runs, tmp_path):
    config = Config(
        model=ModelConfig(num_layers=1, width=14, num_heads=1, mlp_dim=22, inputs="vectors"),
        data=DataConfig(corpus="trigger", sequence_length=9, batch_size=5),
        optimizer=OptimizerConfig(warmup_steps=1),
        run=RunConfig(steps=3, telemetry_interval=2, wandb=True),
    )
    fit(config, tmp_path)
    (run,) = runs
    lines = [{name: x for name, x in line.items() if name != "time"} for line in read_metrics(tmp_path)]
    assert [{"step": step, **values} for step, values in run.lines] == lines
    assert run.given["config"]["run"]["steps"] == 3 and run.code == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of wandb and what it brings
def test_wandb_itself_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, 1, 2)
    write(tmp_path, 2, 3)  # once more from a checkpoint after step 1
    wandb.teardown()  # its process writes files behind finish()
    run_id = (tmp_path / RUN_ID).read_text().strip()
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    for folder, last in ((first, 2), (second, 3)):
        stored = (folder / f"run-{run_id}.wandb").read_bytes()
        assert b"loss" in stored and b"1.5" in stored and json.dumps(last).encode() in stored
        assert run_id in folder.name
