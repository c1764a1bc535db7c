"""The flags of `oasis_jax eval`: what reaches the evaluation, and what is refused before anything is loaded."""

import pathlib

import pytest

from oasis_jax.commands import eval as command
from oasis_jax.config import MeshConfig
from oasis_jax.errors import UserError
from oasis_jax.evaluation import runs
from oasis_jax.evaluation.report import terminal
from oasis_jax.evaluation.subjects import ModelOptions
from oasis_jax.training import distributed
from oasis_jax.training.load import HOW


@pytest.fixture
def calls(monkeypatch):
    """What the command did, in order: [(what, arguments)]."""
    made = []
    monkeypatch.setattr(runs, "evaluate", lambda *args, **options: made.append(("evaluate", args, options)) or ["run"])
    monkeypatch.setattr(terminal, "print_comparison", lambda found: made.append(("print", found)))
    monkeypatch.setattr(distributed, "start", lambda processes: made.append(("start", processes)))
    return made


def test_the_flags_reach_the_evaluation(calls, capsys):
    others = ["--batches=3", "--measures=sinks, joint", "--quantize=w8a8_tensor", "--set=mesh.fsdp=8"]
    command.main(["--workdir=a", "--workdir", "b", "--report=r", *others, "--set", "mesh.tensor=2"])
    (_, places, options), printed = calls
    assert places == ([pathlib.Path("a"), pathlib.Path("b")], pathlib.Path("r")) and printed == ("print", ["run"])
    assert options.pop("options") == ModelOptions(num_batches=3, mesh=MeshConfig(fsdp=8, tensor=2))
    options.pop("unwritten")(["run"])  # measures that could not be written are printed
    assert calls.pop() == ("print", ["run"])
    assert options == dict(
        models=[],
        num_batches=3,
        measures=["sinks", "joint"],
        interventions=[],
        quantize=["w8a8_tensor"],
        overrides=["mesh.fsdp=8", "mesh.tensor=2"],
        tasks=[],
        task_settings={},
    )
    assert capsys.readouterr().out == "report: r/index.html\n"


def test_processes_join_first_and_only_one_of_them_prints(calls, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    command.main(["--workdir=a", "--report=r", "--coordinator=h:1", "--processes=2", "--process=1"])
    assert [what for what, *_ in calls] == ["start", "evaluate"]
    assert calls[0][1] == distributed.Processes("h:1", 2, 1)
    assert capsys.readouterr().out == ""


def test_help_lists_what_may_be_set(capsys):
    assert {*command.FIELDS, "mesh.rules"} == set(HOW)
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("  m", "  d"))]
    assert {row for row in rows if "." in row} == set(command.FIELDS)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--set=mesh.fdsp=8", "--set: unknown name 'mesh.fdsp' (did you mean 'mesh.fsdp'?)"),
        ("--set=mesh.fsdp=two", "mesh.fsdp: expected a whole number, got 'two'"),
        ("--set=fsdp=2", "--set: expected section.field=value, got 'fsdp=2' (did you mean 'mesh.fsdp'?)"),
    ],
)
def test_what_cannot_be_set_is_refused_before_anything_is_loaded(flag, message, calls):
    with pytest.raises(UserError) as caught:
        command.main(["--workdir=a", "--report=r", flag])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not calls


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--report=r"], "x: error: give at least one --workdir FOLDER or --model SOURCE"),
        (["--workdir=a"], "x: error: the following arguments are required: --report"),
        (["--workdirs=a", "--report=r"], "x: error: unknown flag --workdirs (did you mean '--workdir'?)"),
        (["--workdir=a", "--report=r", "--batches=few"], "x: error: argument --batches: invalid int value: 'few'"),
        (["--workdir=a", "--report=r", "--process=0"], "x: error: --process: needs --coordinator and --processes too"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(argv, message, calls, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(argv, "x")
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1
    assert not calls


XLA = "--set=model.attention_implementation=xla"


def test_the_flags_of_models_reach_the_evaluation(calls):
    flags = ["--text=a.txt", "--length=7", "--batch-size=2", "--begin-token=none", "--dtype=bfloat16", "--rotate"]
    command.main(["--model=m", "--model", "n", "--report=r", *flags, "--transplant=auto", XLA])
    (_, places, options), _ = calls
    assert places == ([], pathlib.Path("r")) and options["models"] == ["m", "n"]
    assert options["options"] == ModelOptions(
        "a.txt", 7, 8, 2, "none", "bfloat16", None, {"attention_implementation": "xla"}, "auto", True
    )


def test_the_flags_of_tasks_reach_the_evaluation(calls):
    flags = ["--tasks=gsm8k", "--gsm8k-file=t.jsonl", "--shots=0", "--samples=5", "--pass-at=3", "--temperature=0.7"]
    command.main(["--model=m", "--report=r", *flags])
    (_, _, options), _ = calls
    assert options["tasks"] == ["gsm8k"]
    assert options["task_settings"] == dict(gsm8k_file="t.jsonl", shots=0, samples=5, pass_at=3, temperature=0.7)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model=a", "--shots=2", "--seed=3"], "--shots, --seed: only with --tasks"),
        (["--model=a", "--tasks=gsm8k", "--rotate"], "--tasks: models are scored as they are; leave out --transplant"),
        (["--workdir=a", "--text=b", "--rotate"], "--text, --rotate: only with --model; a run reads its own"),
        (["--model=a", "--set=data.pattern=b"], "--set data.pattern: only with --workdir; a model reads --text"),
        (["--model=a", "--length=0"], "--length: must be at least 1, got 0"),
        (["--model=a", "--dtype=float64"], "--dtype: must be float32 or bfloat16, got 'float64'"),
    ],
)
def test_flags_that_do_not_go_together(calls, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--report=r", *flags])
    assert message in capsys.readouterr().err and not calls
