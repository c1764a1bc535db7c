"""`python -m oasis_jax COMMAND`, and train.py and eval.py as faces of two commands."""

import configparser
import importlib
import io
import os
import pathlib
import subprocess
import sys

import pytest

from oasis_jax.__main__ import main
from oasis_jax.commands import COMMANDS
from oasis_jax.commands.parser import run_main
from pallas_kernels.dispatch import CannotServe

ROOT = pathlib.Path(__file__).parents[2]
CALLS = {
    "a file": ([str(ROOT / "train.py")], "train.py"),
    "the package": (["-m", "oasis_jax", "train"], "oasis_jax train"),
}

ALLOWED = f"allowed: {', '.join(COMMANDS)}\n"


def run(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def exit_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    return exit.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_file_and_its_help(name, capsys):
    assert exit_code([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: oasis_jax {name} ")
    assert ("fields of a config, for --set" in said) == (name != "study")  # whose fields its file sets
    assert ("mesh.fsdp" in said) == (name not in ("export", "prepare", "study"))  # which compute nothing


def test_every_file_of_a_command_is_in_the_table():
    folder = ROOT / "oasis_jax" / "commands"
    names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    modules = {name: importlib.import_module(f"oasis_jax.commands.{name}") for name in names}
    found = {name.replace("_", "-") for name, module in modules.items() if hasattr(module, "main")}
    assert found == set(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands(flag, capsys):
    assert exit_code([flag]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and text in said for name, text in COMMANDS.items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["trian"],
            f"oasis_jax: error: unknown command 'trian' (did you mean 'train'?); {ALLOWED}",
        ),
        (
            ["--config=x"],
            f"oasis_jax: error: unknown command '--config=x'; {ALLOWED}",
        ),
        ([], f"oasis_jax: error: which command?; {ALLOWED}"),
        (["eval", "--workdir=x"], "oasis_jax eval: error: the following arguments are required: --report\n"),
        (["eval", "--workdir=x", "--report=y", "--set=mesh.fdsp=8"], "oasis_jax eval: error: --set: unknown name"),
        (["show"], "oasis_jax show: error: the following arguments are required: CONFIG\n"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, message, capsys):
    assert exit_code(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1


@pytest.mark.parametrize("call", CALLS)
def test_both_ways_to_call_a_command_say_how_they_were_called(call):
    words, program = CALLS[call]
    for flags, message in (
        (["--config=configs/demoo.py", "--workdir=x"], "--config: no such file 'configs/demoo.py'"),
        (["--confg=x"], "unknown flag --confg (did you mean '--config'?)"),
    ):
        done = run(*words, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{program}: error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "operator, field", [("null_attention", "attention_implementation"), ("depth_route", "depth_implementation")]
)
def test_a_backend_that_cannot_serve_here_is_one_line(operator, field, capsys):
    """On any machine: a config names it, and the operator's own error, which is no UserError, arrives."""
    text = f"implementation: {operator} cannot be served by x: runs elsewhere; there are: x, reference"

    def command(argv, program):
        raise CannotServe(text, {"x": "runs elsewhere"})

    with pytest.raises(SystemExit) as exit:
        run_main(command, [], "train.py")
    assert (exit.value.code, capsys.readouterr().err) == (2, f"train.py: error: model.{field}: {text}\n")


def test_what_a_terminal_lacks_letters_for_is_written_out(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda argv, program: print("\u2192 caf\xe9 \udcff"), [])
    out.flush()
    assert ended.value.code == 0 and out.buffer.getvalue() == b"\\u2192 caf\xe9 \\udcff\n"


def test_eval_py_is_a_face_of_eval():
    done = run(str(ROOT / "eval.py"), "--workdir=x", "--report=y", "--set=mesh.fsdp=two")
    assert (done.returncode, done.stderr) == (
        2,
        "eval.py: error: mesh.fsdp: expected a whole number, got 'two'\n",
    )


def test_an_installation_has_the_command():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    scripts = dict(line.split(" = ") for line in parser["options.entry_points"]["console_scripts"].split("\n") if line)
    module, _, name = scripts["oasis_jax"].partition(":")
    assert getattr(importlib.import_module(module), name) is main and list(scripts) == ["oasis_jax"]
