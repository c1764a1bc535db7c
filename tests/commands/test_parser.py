"""What every command line has: mistakes in one line, and exit codes."""

import os
import pathlib
import subprocess
import sys

import pytest

from oasis_jax.commands.parser import Parser

ROOT = pathlib.Path(__file__).parents[2]


def test_what_follows_two_dashes_is_no_flag():
    parser = Parser(prog="x")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--confg"]).words == ["--confg"]


SCRIPT = """
import os, signal, sys, threading
from oasis_jax.commands.parser import run_main
from oasis_jax.errors import Preempted, UserError

# a shell's background jobs ignore it, and so would their children
signal.signal(signal.SIGINT, signal.default_int_handler)

def main(argv, program):
    assert program == "script.py"
    print("ran with", argv)
    if argv == ["user"]:
        raise UserError("model.width: too\\nwide")
    if argv == ["bug"]:
        raise ValueError("a bug")
    if argv == ["interrupt"]:
        os.kill(os.getpid(), signal.SIGINT)
    if argv == ["preempted"]:
        threading.Thread(target=threading.Event().wait).start()  # no end of the interpreter comes after it
        raise Preempted("told to end", compiling=True)

run_main(main)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return lambda *args: subprocess.run(
        [sys.executable, str(path), *args], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.parametrize(
    ("arg", "code", "stderr"),
    [
        ("fine", 0, ""),
        ("user", 2, "script.py: error: model.width: too wide\n"),
        ("interrupt", 130, "script.py: interrupted\n"),
        ("preempted", 143, "script.py: told to end\n"),
    ],
)
def test_exit_codes_and_one_line_on_stderr(script, arg, code, stderr):
    done = script(arg)
    assert (done.returncode, done.stdout, done.stderr) == (code, f"ran with ['{arg}']\n", stderr)


def test_a_bug_keeps_its_traceback(script):
    done = script("bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a bug" in done.stderr
