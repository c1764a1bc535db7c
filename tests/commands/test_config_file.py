"""Config files, as a user of the command line meets them."""

import pathlib
import sys

import pytest

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import PRESETS, Config
from oasis_jax.errors import UserError
from oasis_jax.overrides import apply_overrides

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs").glob("study_*.py"))
CONFIGS = sorted({*(ROOT / "configs").glob("*.py")} - {*STUDIES})


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    "unknown part of a pattern": (
        GET + "return Config(model=ModelConfig(layer_pattern=(LayerPattern(windows=3),)))\n",
        ", line 3: model.layer_pattern.windows: unknown name 'windows' (did you mean 'window'?)",
    ),
    "unknown part of a table": (
        GET + "return Config(model=ModelConfig(rope_scaling=RopeScaling(kind='yarn', factors=3)))\n",
        ", line 3: model.rope_scaling.factors: unknown name 'factors' (did you mean 'factor'?)",
    ),
    "pattern that does not divide": (
        GET + "return Config(model=ModelConfig(num_layers=4, layer_pattern=(LayerPattern(),) * 3))\n",
        ", line 3: model.layer_pattern: 3 entries do not divide num_layers=4",
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
    with pytest.raises(UserError, match="CONFIG: cannot read"):
        load_config(tmp_path, "CONFIG")
