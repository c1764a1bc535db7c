"""`oasis_jax show`: every parameter and every step of a model, from a config or from a workdir."""

import math
import pathlib
import re

import jax
import pytest

from oasis_jax.commands.config_file import load_config
from oasis_jax.commands.config_tables import fields as config_fields
from oasis_jax.commands.model_tables import describe, shortened
from oasis_jax.commands.show import main
from oasis_jax.config import PRESETS, Config, DataConfig, LayerPattern, ModelConfig, RopeScaling
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.model.wiring import schedule

ROOT = pathlib.Path(__file__).parents[2]
SMALL = dict(num_layers=3, width=24, num_heads=3, vocab_size=17)


def shown(*argv: str, capsys) -> str:
    main(list(argv))
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_and_every_step_of_every_method(preset):
    model = ModelConfig(preset=preset, **SMALL, **({"blocks": 4} if PRESETS[preset]["blocks"] else {}))
    text = describe(Config(model=model), 100)
    assert max(map(len, text.splitlines())) <= 100
    shapes = jax.tree.leaves(parameter_shapes(model))
    assert f"in all {sum(map(math.prod, (x.shape for x in shapes))):,}" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines() if line]
    table = rows[[row[0] for row in rows].index("parameter") + 1 : [row[:2] for row in rows].index(["in", "all"])]
    values = [row[-1] for row in table if row[-1] != "stacked"]
    assert sorted(int(value.replace(",", "")) for value in values) == sorted(math.prod(x.shape) for x in shapes)
    steps = schedule(model).steps
    names = [row[0] for row in rows if row and re.fullmatch(r"layer\d\.(attention|mlp)", row[0])]
    assert names == [step.name for step in steps]
    flat = " ".join(text.split())
    for step in steps:
        where = f"adds to slot {step.slot}" if step.members else f"slot {step.slot}"
        assert not step.routers or re.search(
            rf"{step.name} {where}\b.*? {re.escape(shortened(step.routers))} embedding", flat
        ), step.name


def test_layers_that_differ_are_told_apart():
    near = LayerPattern(window=5)
    pattern = (near, LayerPattern(rope_theta=0.0), LayerPattern(window=1024, rope_theta=5e5), near)
    scaling = RopeScaling(kind="linear", factor=2.0)
    model = ModelConfig(**SMALL | dict(num_layers=12), layer_pattern=pattern, rope_fraction=0.5, rope_scaling=scaling)
    flat = " ".join(describe(Config(model=model), 100).split())
    assert "l % 4 = 0, 3 window of 5 rotary, theta 10000 on 4 of 8 channels, linear x2" in flat
    assert "l % 4 = 1 all before none" in flat
    assert "l % 4 = 2 window of 1,024 rotary, theta 500000 on 4 of 8 channels, linear x2" in flat
    learned = ModelConfig(**SMALL, rope_theta=0.0, learned_positions=40, position_offset=2)
    assert "all all before 40 learned; counted from 2" in " ".join(describe(Config(model=learned), 100).split())


def test_a_size_that_the_data_will_set_is_marked():
    small = SMALL | dict(vocab_size=0)
    assert "vocabulary 258, as the bytes tokenizer will have it" in describe(Config(model=ModelConfig(**small)), 100)
    bpe = Config(model=ModelConfig(**small), data=DataConfig(tokenizer="bpe", bpe_vocab_size=777))
    assert "vocabulary 777, as the bpe tokenizer will have it" in describe(bpe, 100)
    assert "vocabulary 17\n" in describe(Config(model=ModelConfig(**SMALL)), 100)
    vectors = Config(
        model=ModelConfig(preset="residual", inputs="vectors", **small),
        data=DataConfig(corpus="trigger", trigger_dim=5),
    )
    assert "vectors of 7, as the corpus trigger will have it" in describe(vectors, 100)


def test_a_config_file_with_fields_set_otherwise(capsys):
    text = shown(
        f"{ROOT}/configs/demo.py",
        "--set=model.qk_norm=true",
        "--set=model.num_layers=2",
        "--set=model.preset=attnres",
        capsys=capsys,
    )
    assert text.startswith("attnres: 2 layers of width 128") and "delta wiring: 4 static routers" in text
    assert "\nother than by default: qk_norm=true\n" in text


def test_a_workdir_shows_what_its_checkpoint_holds(workdir, capsys):
    path, config = workdir
    text = shown(str(path), capsys=capsys)
    assert text.startswith(describe(config, 100) + "\n\nconfig, other than by default\n") and "as the bytes" not in text
    fields = dict(line.split(maxsplit=1) for line in text.partition("by default\n  model.preset")[2].splitlines()[1:])
    assert fields["data.pattern"] == config.data.pattern and fields["model.num_layers"] == "3"
    assert "run.steps" not in fields and "model.normalizer" not in fields
    assert "delta wiring" in shown(str(path), "--set=model.preset=attnres", capsys=capsys)


@pytest.fixture
def workdir(tmp_path):
    """A workdir with a checkpoint, and its config."""
    from oasis_jax.data import load_corpus
    from oasis_jax.placement import make_mesh
    from oasis_jax.training.checkpoints import Checkpoints, Keep
    from oasis_jax.training.description import describe as describe_run
    from oasis_jax.training.state import new_state

    tmp_path /= "a_folder_whose_name_is_longer_than_what_a_terminal_shows_in_one_line" * 2  # and stays in one piece
    tmp_path.mkdir()
    (tmp_path / "text.txt").write_text("words and words\n" * 40)
    (tmp_path / "more.txt").write_text("more words\n" * 40)
    data = DataConfig(corpus="files", pattern=str(tmp_path / "*.txt"), sequence_length=13, holdout_fraction=0.5)
    config = Config(model=ModelConfig(**SMALL | dict(vocab_size=258)), data=data)
    path = tmp_path / "run"
    path.mkdir()
    with Checkpoints(path, keep=Keep(1), say=print) as checkpoints:
        state = new_state(config, make_mesh(config.mesh, jax.devices()[:1]))
        checkpoints.save(state, step=1, data_state={}, description=describe_run(config, load_corpus(data, seed=0)))
    return path, config


def test_two_configs_show_what_differs(workdir, capsys):
    path, config = workdir
    demo, again = f"{ROOT}/configs/demo.py", str(path)
    assert shown(demo, demo, capsys=capsys) == f"{demo} and {demo} are the same config, field by field\n"
    lines = [line.split() for line in shown(demo, again, "--set=run.seed=3", capsys=capsys).splitlines()]
    assert lines[:3] == [["A:", demo], ["B:", again], ["field", "A", "B"]]
    rows = {name: values for name, *values in lines[3:]}
    assert rows["model.num_layers"] == ["4", "3"] and rows["data.corpus"] == ["stdlib", "files"]
    expected = config_fields(load_config(demo)), config_fields(config)
    differing = {name for name in expected[0] if expected[0][name] != expected[1][name]}
    assert rows.keys() >= differing and not rows.keys() & {"run.seed", "model.normalizer"}


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for argv, message in (
        ((f"{ROOT}/configs/demoo.py",), f"CONFIG: no such file '{ROOT}/configs/demoo.py' (did you mean "),
        ((str(tmp_path),), f"CONFIG: there is no run in '{tmp_path}' (it has no folder 'checkpoints'); give a config"),
        ((str(tmp_path / "empty"),), f"CONFIG: the run in '{tmp_path}/empty' has no checkpoint yet"),
        (
            ("demo", "demoo"),
            "CONFIG: no file 'demoo', and no config of the library has this name (did you mean 'demo'?)",
        ),
        ((f"{ROOT}/configs/demo.py", "--set=model.widht=3"), "--set: unknown name 'model.widht' (did you mean"),
        ((f"{ROOT}/configs/demo.py", "--set=model.blocks=2"), "model.blocks: only wiring=delta has blocks"),
    ):
        with pytest.raises(UserError) as caught:
            main(list(argv))
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_runs_of_names_are_shortened():
    assert shortened(["embedding", "layer0", "layer1", "own attention"]) == "embedding, layer0, layer1, own attention"
    assert shortened(["embedding", "block1", "block2", "block10"]) == "embedding, block1 .. block10"
    assert shortened(["embedding", "layer0.attention", "layer0.mlp", "layer1.attention"]) == (
        "embedding, layer0.attention .. layer1.attention"
    )
