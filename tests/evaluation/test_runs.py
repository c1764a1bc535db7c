"""Runs on another mesh than the one that they were trained on, in one process and in several."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from evaluation.test_eight_devices import check_equal
from evaluation.test_report import write_run
from programs import UNOPTIMIZED, on_devices

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation.runs import evaluate
from oasis_jax.training.load import load_run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A tiny run, trained, as its config says, on eight devices."""
    root = tmp_path_factory.mktemp("runs")
    for i in range(4):
        (root / f"{i}.txt").write_text("def double(x):\n    return x + x\n" * 40 + f"# file {i}\n")
    data = DataConfig(
        corpus="files", pattern=str(root / "*.txt"), sequence_length=16, batch_size=3, holdout_fraction=0.3
    )
    model = ModelConfig(preset="oasis", num_layers=2, width=16, num_heads=2, mlp_dim=24)
    write_run(root / "run", Config(model=model, data=data, mesh=MeshConfig(data=1)))
    return root / "run"


@pytest.fixture(autouse=True)
def where_the_texts_lie(workdir, monkeypatch):
    """From elsewhere a run's stored paths are asked for."""
    monkeypatch.chdir(workdir.parent)


def evaluate_in(processes: int, devices: int, workdir: pathlib.Path, report: pathlib.Path, *flags: str) -> dict:
    """What metrics.json says of the run after eval.py in so many processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = on_devices(devices, UNOPTIMIZED)
    command = [sys.executable, "-W", "error", ROOT / "eval.py", f"--workdir={workdir}", f"--report={report}", *flags]
    if processes > 1:
        command += [f"--coordinator={coordinator}", f"--processes={processes}"]
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    own = lambda index: [f"--process={index}"] if processes > 1 else []
    running = [subprocess.Popen([*command, *own(index)], **options) for index in range(processes)]
    try:
        said = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(errors for _, errors in said)
    assert ["report: " in text for text, _ in said] == [True] + [False] * (processes - 1)  # the first one tells
    return json.loads((report / "metrics.json").read_text())["runs"][str(workdir)]


@pytest.mark.slow
def test_two_processes_with_a_mesh_of_eight_measure_what_one_device_does(workdir, tmp_path):
    flags = ("--measures=all", "--interventions=beta,softmax", "--quantize=w4a16_g128")
    alone = evaluate_in(1, 1, workdir, tmp_path / "alone", *flags)
    several = evaluate_in(2, 4, workdir, tmp_path / "several", *flags, "--set", "mesh.fsdp=8")
    assert check_equal(alone, several) > 1000


def test_parameters_are_read_where_they_are_to_lie(workdir):
    run = load_run(workdir, overrides=["mesh.data=1", "model.attention_implementation=reference"])
    assert run.config.model.attention_implementation == "reference"
    assert run.placement.mesh.shape == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    query = run.params["layers"]["attention"]["query"]
    assert query.shape == (2, 16, 2, 8) and query.sharding.mesh == run.placement.mesh
    assert jax.tree.structure(run.params) == jax.tree.structure(load_run(workdir).params)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.normalizer=softmax",
            "^--set: model.normalizer is part of what was trained and stays as it is; allowed: ",
        ),
        ("data.sequence_length=8", "^--set: data.sequence_length is part of what was trained"),
        ("mesh.fspd=8", r"^--set: unknown name 'mesh.fspd' \(did you mean 'mesh.fsdp'\?\)"),
        ("mesh.fsdp=64", "^mesh: data=1 x fsdp=64 x tensor=1 needs 64 devices"),
        ("model.attention_implementation=flash", "unknown name 'flash'"),
    ],
)
def test_what_may_not_be_set_is_named(workdir, tmp_path, override, says):
    with pytest.raises(UserError, match=says) as error:
        evaluate([workdir], tmp_path, overrides=[override])
    assert "\n" not in str(error.value)
