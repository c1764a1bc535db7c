"""Config files, overrides, help and exit codes, as a user of the command line meets them."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from oasis_jax.commands.command_line import (
    Parser,
    apply_overrides,
    describe_fields,
    load_config,
    parse_train,
    train_parser,
)
from oasis_jax.config import METHOD_FIELDS, PRESETS, Config, DataConfig, ModelConfig, sections
from oasis_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# Config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_of_the_house_load_and_their_header_names_their_command(path):
    assert isinstance(load_config(path), Config)
    header = path.read_text().split('"""')[1]
    assert f"python train.py --config=configs/{path.name} --workdir=" in header
    assert "Hardware: " in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_can_be_set_on_every_config(path, preset):
    extra = ["model.blocks=2"] if PRESETS[preset]["blocks"] else []
    assert apply_overrides(load_config(path), [f"model.preset={preset}", *extra]).model.preset == preset


def test_a_config_file_leaves_no_traces(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from oasis_jax.config import Config\ndef get_config():\n    return Config()\n")
    modules, folders = set(sys.modules), list(sys.path)
    assert load_config(str(path)) == Config()
    assert (set(sys.modules), sys.path) == (modules, folders)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


GET = "from oasis_jax.config import *\ndef get_config():\n    "
BROKEN_FILES = {
    "no function": ("x = 1\n", ": has no function get_config()"),
    "not a function": ("get_config = 3\n", ": has no function get_config()"),
    "returns a dict": (
        "def get_config():\n    return {}\n",
        ": get_config() has to return an oasis_jax.config.Config, got dict",
    ),
    "syntax": ("x = 1\n\ndef get_config(:\n", ", line 3: not valid Python: "),
    "null byte": ("x = '\0'\n", ": not valid Python: "),
    "import": ("import numpi\n", ", line 1: ModuleNotFoundError: No module named 'numpi'"),
    "exception": ("def get_config():\n    return 1 / 0\n", ", line 2: ZeroDivisionError: division by zero"),
    "wrong name": (
        GET + "return Config(model=ModelConfig(preset='oasys'))\n",
        ", line 3: model.preset: unknown name 'oasys' (did you mean 'oasis'?)",
    ),
    "unknown field": (
        GET + "return Config(model=ModelConfig(num_layer=3))\n",
        ", line 3: model.num_layer: unknown name 'num_layer' (did you mean 'num_layers'?)",
    ),
    "unknown section": (
        GET + "return Config(optimiser=OptimizerConfig())\n",
        ", line 3: config.optimiser: unknown name 'optimiser' (did you mean 'optimizer'?)",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_config_file_is_told_in_one_line(case, tmp_path):
    text, expected = BROKEN_FILES[case]
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = one_line(caught)
    assert message.startswith(str(path)) and expected in message


def test_a_missing_config_file_names_the_nearest(tmp_path):
    (tmp_path / "demo.py").touch()
    (tmp_path / "trigger.py").touch()
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "demoo.py")
    message = one_line(caught)
    assert f"no such file '{tmp_path}/demoo.py' (did you mean '{tmp_path}/demo.py'?)" in message
    assert f"allowed: {tmp_path}/demo.py, {tmp_path}/trigger.py" in message


def test_a_missing_folder_and_a_folder_for_a_file(tmp_path):
    with pytest.raises(UserError, match=r"there is no \.py file in"):
        load_config(tmp_path / "none" / "demo.py")
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path)


# Overrides


def test_values_take_the_type_of_their_field():
    changed = apply_overrides(
        Config(),
        [
            "model.num_layers=7",
            "model.qk_norm=True",
            "model.tied_head=false",
            "model.norm=dyt",
            "data.pattern=a=b/*.txt",
            "optimizer.learning_rate=1e-3",
            "optimizer.weight_decay=1",
            "run.steps=2e3",
            "mesh.data=-1",
        ],
    )
    assert (changed.model.num_layers, changed.model.qk_norm, changed.model.tied_head, changed.model.norm) == (
        7,
        True,
        False,
        "dyt",
    )
    assert changed.data.pattern == "a=b/*.txt"
    assert (changed.optimizer.learning_rate, changed.optimizer.weight_decay) == (1e-3, 1.0)
    assert changed.run.steps == 2000 and isinstance(changed.run.steps, int)
    assert isinstance(changed.optimizer.weight_decay, float)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_brings_its_method_whatever_the_order(preset):
    base = Config(model=ModelConfig(preset="oasis", width=132, num_heads=6, gate="per_head"))
    given = [f"model.preset={preset}", "model.normalizer=softpick", "model.num_layers=5"]
    expected = ModelConfig(preset=preset, normalizer="softpick", num_layers=5, width=132, num_heads=6)
    assert apply_overrides(base, given).model == expected
    assert apply_overrides(base, given[::-1]).model == expected


def test_only_the_result_has_to_fit_together():
    given = ["model.num_heads=6", "model.width=132", "data.corpus=trigger", "model.inputs=vectors"]
    for order in (given, given[::-1]):
        changed = apply_overrides(Config(), order)
        assert (changed.model.head_size, changed.data.corpus) == (22, "trigger")


def test_without_assignments_nothing_changes_and_the_last_of_two_counts():
    config = Config(model=ModelConfig(preset="attnres"))
    assert apply_overrides(config, []) == config
    assert apply_overrides(config, ["run.seed=1", "run.seed=2"]).run.seed == 2


WRONG = {
    "model.num_layer=3": "--set: unknown name 'model.num_layer' (did you mean 'model.num_layers'?); allowed: "
    "model.norm",
    "modle.width=3": "--set: unknown name 'modle.width' (did you mean 'model.width'?); allowed: model, data, "
    "optimizer, mesh, run",
    "model.learning_rate=3": "--set: unknown name 'model.learning_rate' (did you mean 'optimizer.learning_rate'?)",
    "num_layers=3": "--set: expected section.field=value, got 'num_layers=3' (did you mean 'model.num_layers'?)",
    "model.num_layers": "--set: expected section.field=value, got 'model.num_layers' (did you mean "
    "'model.num_layers'?)",
    "": "--set: expected section.field=value, got ''",
    "=3": "--set: expected section.field=value, got '=3'",
    "mesh.rules=x": "--set: mesh.rules is a table and cannot be set on the command line; write it in a config file",
    "model.num_layers=four": "model.num_layers: expected a whole number, got 'four'",
    "model.num_layers=": "model.num_layers: expected a whole number, got ''",
    "model.num_layers=2.5": "model.num_layers: expected a whole number, got '2.5'",
    "model.num_layers=inf": "model.num_layers: expected a whole number, got 'inf'",
    "optimizer.learning_rate=fast": "optimizer.learning_rate: expected a number, got 'fast'",
    "optimizer.learning_rate=nan": "optimizer.learning_rate: must be finite, got nan",
    "model.qk_norm=1": "model.qk_norm: expected true or false, got '1'",
    "model.coupling=yes": "model.coupling: expected true or false, got 'yes'",
    "model.preset=oassis": "model.preset: unknown name 'oassis' (did you mean 'oasis'?)",
    "model.normalizer=sofmax1": "model.normalizer: unknown name 'sofmax1' (did you mean 'softmax1'?)",
    "data.corpus=files": "data.pattern: corpus=files needs a glob",
}


@pytest.mark.parametrize("assignment", WRONG)
def test_a_wrong_assignment_is_told_in_one_line(assignment):
    with pytest.raises(UserError) as caught:
        apply_overrides(Config(), [assignment])
    assert one_line(caught).startswith(WRONG[assignment])


# Help


def test_help_lists_every_field_with_type_default_and_help(capsys):
    with pytest.raises(SystemExit) as exit:
        train_parser().parse_args(["--help"])
    assert exit.value.code == 0
    rows = {
        line.split()[0]: line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ") and "." in line.split()[0]
    }
    for section, cls in sections().items():
        for field in dataclasses.fields(cls):
            name, kind, *rest = rows[f"{section}.{field.name}"]
            assert kind in ("int", "float", "bool", "str", "name", "tuple"), name
            assert rest, name
    assert rows["model.num_layers"][:5] == ["model.num_layers", "int", "4", "layers,", "each"]
    assert rows["model.tied_head"][:3] == ["model.tied_head", "bool", "true"]
    assert rows["optimizer.learning_rate"][:3] == ["optimizer.learning_rate", "float", "0.003"]
    for name in METHOD_FIELDS:
        assert rows[f"model.{name}"][2:5] == ["of", "the", "preset"]


def test_described_fields_are_wrapped_aligned_and_complete():
    text = describe_fields(100)
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].split()[0] == "model.preset"
    flat = " ".join(text.split())
    assert f"one of: {', '.join(PRESETS)}" in flat
    assert "one of: softmax, softmax1, learned_sink, clipped, entmax15, sparsemax, softpick" in flat
    assert "what is split over what; only in a config file" in flat
    starts = {
        line.index(line.split(maxsplit=3)[3])
        for line in text.splitlines()
        if line.lstrip().startswith(("run.", "optimizer."))
    }
    assert len(starts) == 1


# Parsers and exit codes


def test_parse_train_reads_a_config_and_its_overrides(tmp_path):
    path = str(ROOT / "configs" / "demo.py")
    config, workdir, processes, profile, plan = parse_train(
        [f"--config={path}", "--workdir", str(tmp_path / "x"), "--set", "run.steps=3", "--set=model.preset=attnres"]
    )
    assert workdir == tmp_path / "x" and processes is profile is plan is None
    assert config == apply_overrides(load_config(path), ["run.steps=3", "model.preset=attnres"])


def test_processes_are_named_by_flags_or_by_the_scheduler(capsys):
    config = f"--config={ROOT}/configs/demo.py"
    assert parse_train([config, "--workdir=x", "--distributed"]).processes == ("", 0, 0)
    flags = ["--coordinator=10.0.0.1:1234", "--processes=4", "--process=0"]
    assert parse_train([config, "--workdir=x", *flags]).processes == ("10.0.0.1:1234", 4, 0)
    for wrong, message in ((flags[:2], "needs --process too"), (["--distributed", *flags], "give one or the other")):
        with pytest.raises(SystemExit, match="2"):
            parse_train([config, "--workdir=x", *wrong])
        assert message in capsys.readouterr().err


def test_a_plan_needs_no_workdir_and_goes_with_nothing_of_a_run(capsys):
    config = f"--config={ROOT}/configs/demo.py"
    asked = parse_train([config, "--plan=v5p:4x4x4"])
    assert (asked.workdir, asked.plan) == (None, "v5p:4x4x4")
    for wrong in ("--distributed", "--profile=1:2"):
        with pytest.raises(SystemExit, match="2"):
            parse_train([config, "--plan=v5p:4x4x4", wrong])
        assert "--plan trains nothing" in capsys.readouterr().err


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
        train_parser().parse_args(list(argv))
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(FLAGS[argv]) and message.count("\n") == 1


def test_what_follows_two_dashes_is_no_flag():
    parser = Parser(prog="x")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--confg"]).words == ["--confg"]


SCRIPT = """
import os, signal, sys
from oasis_jax.commands.command_line import run_main
from oasis_jax.errors import UserError

# a shell's background jobs ignore it, and so would their children
signal.signal(signal.SIGINT, signal.default_int_handler)

def main(argv):
    print("ran with", argv)
    if argv == ["user"]:
        raise UserError("model.width: too\\nwide")
    if argv == ["bug"]:
        raise ValueError("a bug")
    if argv == ["interrupt"]:
        os.kill(os.getpid(), signal.SIGINT)

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
    ],
)
def test_exit_codes_and_one_line_on_stderr(script, arg, code, stderr):
    done = script(arg)
    assert (done.returncode, done.stdout, done.stderr) == (code, f"ran with ['{arg}']\n", stderr)


def test_a_bug_keeps_its_traceback(script):
    done = script("bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a bug" in done.stderr


def test_a_batch_of_the_config_file_can_be_overridden_together_with_its_parts():
    config = Config(data=DataConfig(batch_size=6))
    changed = apply_overrides(config, ["optimizer.accumulation_steps=5", "data.batch_size=15"])
    assert (changed.data.batch_size, changed.optimizer.accumulation_steps) == (15, 5)
