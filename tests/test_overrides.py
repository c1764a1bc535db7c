"""Fields that are set otherwise: section.field=value."""

import pytest

from oasis_jax.config import PRESETS, Config, DataConfig, ModelConfig, field_type
from oasis_jax.errors import UserError
from oasis_jax.overrides import all_fields, apply_overrides, is_table, parse_overrides


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    "model.preset",
    "modle.width=3": "--set: unknown name 'modle.width' (did you mean 'model.width'?); allowed: model, data, "
    "optimizer, mesh, run",
    "model.learning_rate=3": "--set: unknown name 'model.learning_rate' (did you mean 'optimizer.learning_rate'?)",
    "model.learning_rat=3": "--set: unknown name 'model.learning_rat' (did you mean 'optimizer.learning_rate'?)",
    "run.batchsize=3": "--set: unknown name 'run.batchsize' (did you mean 'data.batch_size'?)",
    "optimiser.warmup=3": "--set: unknown name 'optimiser.warmup' (did you mean 'optimizer.warmup_steps'?)",
    "data.widht=3": "--set: unknown name 'data.widht' (did you mean 'model.width'?)",
    "mesh.xyzzy=3": "--set: unknown name 'mesh.xyzzy'; allowed: mesh.data",
    "checkpoint_intervall=3": "--set: expected section.field=value, got 'checkpoint_intervall=3' (did you mean "
    "'run.checkpoint_interval'?)",
    "num_layers=3": "--set: expected section.field=value, got 'num_layers=3' (did you mean 'model.num_layers'?)",
    "model.num_layers": "--set: expected section.field=value, got 'model.num_layers' (did you mean "
    "'model.num_layers'?)",
    "": "--set: expected section.field=value, got ''",
    "=3": "--set: expected section.field=value, got '=3'",
    "mesh.rules=x": "--set: mesh.rules is a table and cannot be set on the command line; write it in a config file",
    "model.layer_pattern=()": "--set: model.layer_pattern is a table and cannot be set",
    "model.rope_scaling=yarn": "--set: model.rope_scaling is a table and cannot be set",
    "model.rope_scalings=yarn": "--set: unknown name 'model.rope_scalings' (did you mean 'model.rope_scaling'?)",
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


@pytest.mark.parametrize("name", [f"{section}.{field.name}" for section, _, field in all_fields()])
def test_a_field_is_found_from_any_section_and_with_a_letter_missing(name):
    section, _, field = name.partition(".")
    for given in (f"elsewhere.{field}", f"{section}.{field[1:]}" if len(field) > 4 else f"{section}.{field}x"):
        with pytest.raises(UserError) as caught:
            parse_overrides([f"{given}=1"])
        meant = one_line(caught).partition("did you mean '")[2].partition("'")[0]
        assert meant.partition(".")[2] == field and (given.startswith("elsewhere") or meant == name)


def test_a_batch_of_the_config_file_can_be_overridden_together_with_its_parts():
    config = Config(data=DataConfig(batch_size=6))
    changed = apply_overrides(config, ["optimizer.accumulation_steps=5", "data.batch_size=15"])
    assert (changed.data.batch_size, changed.optimizer.accumulation_steps) == (15, 5)


def test_what_is_a_table_follows_from_its_type():
    """Everything else is one value, which the command line can give."""
    tables = {f"{section}.{f.name}" for section, cls, f in all_fields() if is_table(field_type(cls, f.name))}
    assert tables == {"mesh.rules", "model.layer_pattern", "model.rope_scaling"}


def test_overrides_are_read_without_a_config():
    assert parse_overrides(["mesh.fsdp=2", "model.width=12", "mesh.fsdp=3"]) == {
        "mesh": {"fsdp": 3},
        "model": {"width": 12},
    }
