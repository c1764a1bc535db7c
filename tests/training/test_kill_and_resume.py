"""kill -9 at random moments, then the same command again: nothing may tell the run from one that was never
disturbed.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 150
# A parameter-heavy model with a checkpoint every few steps: a good part of the time goes into saving, and kills fall
# into it.
CONFIG = """
from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

def get_config():
    return Config(
        model=ModelConfig(preset="oasis", inputs="vectors", num_layers=1, width=34, num_heads=1, mlp_dim=3000),
        data=DataConfig(corpus="trigger", sequence_length=9, batch_size=6, trigger_dim=5),
        optimizer=OptimizerConfig(warmup_steps=7),
        run=RunConfig(steps={steps}, checkpoint_interval=7, telemetry_interval=5, keep_checkpoints=2),
    )
"""


def start(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", ROOT / "train.py", f"--config={config}", f"--workdir={workdir}"]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def logged(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides; every line has to be whole."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if not name.endswith(("time", "_per_second", "_seconds", "_share"))
        }
        for line in lines
    ]


def last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_at(process: subprocess.Popen, workdir: pathlib.Path, step: int, delay: float) -> bool:
    """Sends SIGKILL some seconds after the run has reached a step; False where it ended before."""
    while last_step(workdir) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[pathlib.Path, list[dict]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = folder / "config.py"
    config.write_text(CONFIG.format(steps=STEPS))
    finish(start(config, folder / "run"))
    return config, logged(folder / "run")


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_bitwise_the_same_losses(undisturbed, tmp_path, kills):
    config, expected = undisturbed
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    chance = random.Random(seed)
    workdir = tmp_path / "run"
    done = 0
    for kill in range(kills):
        # Each kill falls somewhere into its share of the steps, the delay into a step, a save, or what lies between.
        step = round((kill + chance.random()) * (STEPS - 20) / kills)
        done += kill_at(start(config, workdir), workdir, step, chance.uniform(0, 0.05))
    output = finish(start(config, workdir))
    assert done == kills
    assert "resumed at step" in output
    assert [line["step"] for line in logged(workdir)] == list(range(1, STEPS + 1))
    assert logged(workdir) == expected
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["147", "150"]
