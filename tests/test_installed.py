"""A wheel in an environment of its own, far from the clone: commands, configs, types, version."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from oasis_jax.commands.config_file import load_config, shipped_configs
from oasis_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("oasis_jax", "pallas_kernels", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """The folder of an environment's programs; what the wheel requires is borrowed from this one."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "source").mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    if built.returncode and "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("setuptools, which builds the wheel, cannot be fetched")
    assert built.returncode == 0, built.stderr
    assert run(sys.executable, "-m", "venv", "--without-pip", folder / "venv").returncode == 0
    (wheel,) = folder.glob("*.whl")
    programs = folder / "venv" / "bin"
    placed = run(*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    assert placed.returncode == 0, placed.stderr
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(folder / "source")
    return programs


@pytest.fixture
def environment() -> dict:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_a_wheel_carries_commands_and_configs(installed, environment, tmp_path):
    code = "import oasis_jax, pathlib; f = pathlib.Path(oasis_jax.__file__); print(oasis_jax.__version__, f)"
    found = run(installed / "python", "-c", code, env=environment, cwd=tmp_path)
    version, file = found.stdout.split()
    assert f"version = {version}\n" in (ROOT / "setup.cfg").read_text()
    home = pathlib.Path(file).parents[1]
    assert home.is_relative_to(installed.parent)
    assert all((home / name / "py.typed").is_file() for name in ("oasis_jax", "pallas_kernels"))
    small = (
        "run.steps=2",
        "optimizer.warmup_steps=1",
        "model.num_layers=1",
        "model.width=16",
        "data.sequence_length=32",
    )
    small = [part for value in small for part in ("--set", value)]
    train = run(
        installed / "oasis_jax", "train", "--config=demo", "--workdir=run", *small, env=environment, cwd=tmp_path
    )
    assert train.returncode == 0, train.stderr
    show = run(installed / "python", "-m", "oasis_jax", "show", "trigger", env=environment, cwd=tmp_path)
    assert show.returncode == 0 and "softmax" in show.stdout, show.stderr


def test_configs_are_known_by_their_names():
    assert shipped_configs().keys() == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert load_config("demo") == load_config(ROOT / "configs" / "demo.py")
    with pytest.raises(UserError, match=r"--config: no file 'demoo', .* \(did you mean 'demo'\?\); allowed: a file"):
        load_config("demoo")


def test_a_file_without_an_ending_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "demo.py").read_text()
    pathlib.Path("demo").write_text(text.replace("num_layers=4", "num_layers=3"))
    assert load_config("demo").model.num_layers == 3


def test_the_version_is_that_of_the_distribution():
    import oasis_jax

    assert f"version = {oasis_jax.__version__}\n" in (ROOT / "setup.cfg").read_text()
