"""The flags of `oasis_jax train`."""

import pathlib

import jax
import pytest

from oasis_jax.commands import eval, train
from oasis_jax.commands.config_file import load_config
from oasis_jax.commands.train import main, make_parser, parse
from oasis_jax.overrides import apply_overrides
from oasis_jax.training import plan

ROOT = pathlib.Path(__file__).parents[2]


CONFIG = f"--config={ROOT}/configs/demo.py"


def test_a_config_and_what_is_set_otherwise(tmp_path):
    asked = parse([CONFIG, "--workdir", str(tmp_path / "x"), "--set", "run.steps=3", "--set=model.preset=attnres"], "x")
    assert asked.workdir == tmp_path / "x" and asked.processes is asked.profile is asked.plan is None
    demo = load_config(ROOT / "configs" / "demo.py")
    assert asked.config == apply_overrides(demo, ["run.steps=3", "model.preset=attnres"])
    assert parse([CONFIG, "--workdir=x", "--distributed"], "x").processes == ("", 0, 0)


def test_a_plan_needs_no_workdir_and_goes_with_nothing_of_a_run(capsys):
    asked = parse([CONFIG, "--plan=v5p:4x4x4"], "x")
    assert (asked.workdir, asked.plan) == (None, "v5p:4x4x4")
    for wrong in ("--distributed", "--profile=1:2"):
        with pytest.raises(SystemExit, match="2"):
            parse([CONFIG, "--plan=v5p:4x4x4", wrong], "x")
        assert "x: error: --plan trains nothing" in capsys.readouterr().err


FLAGS = {
    (
        "--confg=a.py",
        "--workdir=b",
    ): "train.py: error: unknown flag --confg (did you mean '--config'?); allowed: --help, --config, --workdir, "
    "--plan, --set",
    ("--config=a.py", "--work=b"): "train.py: error: unknown flag --work (did you mean '--workdir'?)",
    ("--config=a.py",): "train.py: error: one of the arguments --workdir --plan is required",
    ("--config",): "train.py: error: argument --config: expected one argument",
    (
        "--config=a.py",
        "--workdir=b",
        "--plan=h100:8",
    ): "train.py: error: argument --plan: not allowed with argument --workdir",
    ("--config=a.py", "--workdir=b", "c"): "train.py: error: unrecognized arguments: c",
}


@pytest.mark.parametrize("argv", FLAGS, ids=" ".join)
def test_wrong_flags_are_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        make_parser("train.py").parse_args(list(argv))
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(FLAGS[argv]) and message.count("\n") == 1


@pytest.mark.parametrize(("memory", "code"), [(16.0, 0), (0.0001, 1)])
def test_a_plan_compiles_training_and_evaluation(memory, code, monkeypatch, capsys):
    """On the CPU that is there, in place of hardware that is not."""
    monkeypatch.setattr(plan, "target", lambda text: plan.Target(text, jax.devices("cpu")[:1], memory))
    small = ("model.preset=residual", "model.num_layers=1", "model.width=16", "data.sequence_length=32")
    argv = [CONFIG, "--plan=cpu:1", *(f"--set={field}" for field in small)]
    if code:
        with pytest.raises(SystemExit, match=str(code)):
            main(argv)
    else:
        main(argv)
    said = capsys.readouterr()
    assert said.err == "compiling the training step ...\ncompiling the evaluation ...\n"
    verdict = "DOES NOT FIT" if code else "fits"
    rows = {line[:24].strip(): line for line in said.out.splitlines()}
    for name in ("together", "evaluation", "evaluation in training"):
        assert verdict in rows[name], name
    assert ("suggestion: " in said.out) == bool(code)


def test_an_empty_name_of_a_folder_is_refused(capsys):
    for command, flags in ((train, [CONFIG, "--workdir="]), (eval, ["--workdir", "", "--report=x"])):
        with pytest.raises(SystemExit, match="2"):
            command.main(flags, "x")
        assert capsys.readouterr().err == "x: error: argument --workdir: names no folder; for the current one write .\n"
