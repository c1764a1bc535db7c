"""The schema: presets, round trips, and what a wrong value is told."""

import dataclasses
import json
import pathlib
import re

import pytest

from oasis_jax.commands.options import describe_fields
from oasis_jax.config import (
    METHOD_FIELDS,
    PRESETS,
    AttentionConfig,
    Config,
    DataConfig,
    LayerPattern,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RouterConfig,
    RunConfig,
    from_dict,
    sections,
    to_dict,
)
from oasis_jax.errors import UserError
from oasis_jax.overrides import apply_overrides

# The methods as their papers give them: normalizer, wiring, router, depth normalizer, coupling, gate, blocks, output
# norm.
METHODS = {
    "residual": ("softmax", "residual", "none", "softmax", False, "none", 0, False),
    "attnres": ("softmax", "delta", "static", "softmax", False, "none", 0, False),
    "attnres_rms": ("softmax", "delta", "static", "softmax", False, "none", 8, True),
    "attnres_qkv": ("softmax", "delta", "qkv", "softmax", False, "none", 8, False),
    "attnres_cumulative": ("softmax", "cumulative", "projected", "softmax", False, "none", 0, False),
    "softmax1": ("softmax1", "cumulative", "projected", "softmax", False, "none", 0, False),
    "clipped": ("clipped", "cumulative", "projected", "softmax", False, "none", 0, False),
    "entmax15": ("entmax15", "cumulative", "projected", "softmax", False, "none", 0, False),
    "sparsemax": ("sparsemax", "cumulative", "projected", "softmax", False, "none", 0, False),
    "gated": ("softmax", "cumulative", "projected", "softmax", False, "elementwise", 0, False),
    "learned_sink": ("learned_sink", "cumulative", "projected", "softmax", False, "none", 0, False),
    "null_key": ("null_key", "cumulative", "projected", "softmax", False, "none", 0, False),
    "null_key_value": ("null_key_value", "cumulative", "projected", "softmax", False, "none", 0, False),
    "token_null": ("token_null", "cumulative", "projected", "softmax", False, "none", 0, False),
    "oasis": ("softmax1", "cumulative", "projected", "softmax1", True, "none", 0, False),
    "oasis_blocks": ("softmax1", "delta", "static", "softmax1", True, "none", 8, False),
}


def test_every_preset_is_in_the_table():
    assert set(PRESETS) == set(METHODS)


@pytest.mark.parametrize("preset", METHODS)
def test_preset_gives_the_fields_of_its_method(preset):
    model = ModelConfig(preset=preset)
    found = (
        model.normalizer,
        model.wiring,
        model.router,
        model.depth_normalizer,
        model.coupling,
        model.gate,
        model.blocks,
        model.output_norm,
    )
    assert found == METHODS[preset]


@pytest.mark.parametrize("preset", METHODS)
def test_with_preset_replaces_the_method_and_keeps_the_rest(preset):
    changed = ModelConfig(preset="oasis", num_layers=5, width=84, num_heads=6, normalizer="softpick").with_preset(
        preset
    )
    assert changed == ModelConfig(preset=preset, num_layers=5, width=84, num_heads=6)


def test_a_given_method_field_wins_over_its_preset():
    model = ModelConfig(preset="oasis", coupling=False, depth_normalizer="softmax")
    assert (model.coupling, model.depth_normalizer, model.normalizer) == (False, "softmax", "softmax1")


@pytest.mark.parametrize("preset", METHODS)
def test_round_trip_through_json(preset):
    config = Config(
        model=ModelConfig(preset=preset, num_layers=5, qk_norm=True),
        data=DataConfig(sequence_length=37, begin_token=False),
        optimizer=OptimizerConfig(learning_rate=1e-5, accumulation_steps=4),
        mesh=MeshConfig(data=2, tensor=3, rules=(("batch", ("data",)), ("mlp", ("fsdp", "tensor")))),
        run=RunConfig(steps=7, tensorboard=True),
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_refuses_a_field_it_does_not_know():
    values = to_dict(Config())
    values["model"]["num_layer"] = 3
    with pytest.raises(UserError, match=r"model.num_layer: unknown name 'num_layer' .did you mean 'num_layers'"):
        from_dict(values)


def test_a_stored_config_with_an_unknown_field_names_the_version_that_wrote_it():
    values = to_dict(Config(model=ModelConfig(layer_pattern=(LayerPattern(window=3),))))
    values["model"]["layer_pattern"][0]["windows"] = 4
    words = r"layer_pattern.windows: unknown name .*did you mean 'window'.*; the config was written by oasis_jax 9.1$"
    with pytest.raises(UserError, match=words):
        from_dict(values, "9.1")


def test_tables_survive_json():
    scaling = RopeScaling(kind="longrope", factor=4, original_length=64, short_factors=(1,) * 3, long_factors=(2, 3, 4))
    pattern = (LayerPattern(window=5), LayerPattern(rope_theta=0.0))
    model = ModelConfig(width=24, num_heads=4, rope_scaling=scaling, layer_pattern=pattern)
    config = Config(model=model)
    found = from_dict(json.loads(json.dumps(to_dict(config))))
    assert found == config and hash(found.model) == hash(model)


def test_layers_follow_the_pattern():
    pattern = (LayerPattern(window=5, rope_theta=7.0), LayerPattern(rope_theta=0.0))
    model = ModelConfig(num_layers=4, layer_pattern=pattern, window=99)
    layers = [model.layer(i) for i in range(4)]
    assert [(x.window, x.rope_theta, x.layer_pattern) for x in layers] == [(5, 7.0, ()), (0, 0.0, ())] * 2
    assert model.period == 2 and ModelConfig().layer(3) == ModelConfig()


# Fields of a model that no config or preset of this project turns, and whose experiment does.
TURNED_ELSEWHERE = {
    "clip_gamma": "clipped softmax with a fixed stretch (arXiv 2306.12929)",
    "clip_zeta": "clipped softmax with an upper stretch (arXiv 2306.12929)",
    "clip_alpha": "how strongly clipped softmax clips (arXiv 2306.12929)",
    "null_keys": "a prefix of constant tokens, as a sink transplant makes it",
    "logit_softcap": "bounded scores, as Gemma 2 has them",
    "mlp_rotation": "8-bit inference of a rotated model: oasis_jax.pretrained.rotate",
    "null_bias": "a sink transplant into some heads: oasis_jax.pretrained.transplant_sink",
    "null_weight": "a null that grows from softmax: optimizer.null_ramp_steps, benchmarks/retrofit.py",
    "null_value_weight": "a transplanted null whose value fades: optimizer.null_value_fade_steps",
    "alpha_gate": "routers that join a trained model: benchmarks/retrofit.py",
    "context_length": "longest text of a pretrained model: oasis_jax.pretrained.families",
    "attention_implementation": "a backend's speed, with --set",
    "depth_implementation": "a backend's speed, with --set",
    "vector_dim": "from the data",
    "stack": "benchmarks/stack_memory.py",
}


def test_every_field_of_a_model_is_turned_by_an_experiment():
    folder = pathlib.Path(__file__).parents[1]
    texts = [path.read_text() for path in (folder / "configs").glob("*.py")]
    text = "".join(texts) + (folder / "oasis_jax" / "config" / "methods.py").read_text()
    turned = {field.name for field in dataclasses.fields(ModelConfig) if re.search(rf"\b{field.name}=", text)}
    rest = {field.name for field in dataclasses.fields(ModelConfig)} - turned
    assert rest == set(TURNED_ELSEWHERE)


def test_every_field_says_what_it_is():
    for cls in sections().values():
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], field.name
            assert "\n" not in field.metadata["help"]


def test_method_fields_are_the_ones_without_a_default_of_their_own():
    optional = {"rope_scaling"}
    without = {field.name for field in dataclasses.fields(ModelConfig) if field.default is None} - optional
    assert without == set(METHOD_FIELDS)


def test_sizes_that_follow_from_others():
    model = ModelConfig(width=132, num_heads=6, num_kv_heads=3)
    assert (model.head_size, model.key_heads, model.mlp_size) == (22, 3, 352)
    assert ModelConfig(width=132, num_heads=6).key_heads == 6
    assert ModelConfig(width=132, num_heads=5, head_dim=14, mlp_dim=99).head_size == 14
    assert ModelConfig(mlp_dim=99).mlp_size == 99


WRONG = {
    "unknown preset": (
        lambda: ModelConfig(preset="oasys"),
        "model.preset: unknown name 'oasys' (did you mean 'oasis'?); allowed: residual,",
    ),
    "unknown normalizer": (
        lambda: ModelConfig(normalizer="softmax2"),
        "model.normalizer: unknown name 'softmax2' (did you mean 'softmax",
    ),
    "unknown wiring": (
        lambda: ModelConfig(wiring="cumulativ"),
        "model.wiring: unknown name 'cumulativ' (did you mean 'cumulative'?)",
    ),
    "unknown norm": (lambda: ModelConfig(norm="rms"), "model.norm: unknown name 'rms' (did you mean 'rmsnorm'?)"),
    "unknown corpus": (
        lambda: DataConfig(corpus="stdlibs"),
        "data.corpus: unknown name 'stdlibs' (did you mean 'stdlib'?); allowed: stdlib,",
    ),
    "name with nothing near": (
        lambda: ModelConfig(router="xyzzy"),
        "model.router: unknown name 'xyzzy'; allowed: projected, static, qkv, none",
    ),
    "text for a number": (lambda: ModelConfig(num_layers="4"), "model.num_layers: expected int, got '4' of type str"),
    "bool for a number": (lambda: ModelConfig(width=True), "model.width: expected int, got True of type bool"),
    "number for a bool": (lambda: ModelConfig(qk_norm=1), "model.qk_norm: expected bool, got 1 of type int"),
    "float for an int": (lambda: RunConfig(steps=3.0), "run.steps: expected int, got 3.0 of type float"),
    "not a number": (
        lambda: OptimizerConfig(learning_rate=float("nan")),
        "optimizer.learning_rate: must be finite, got nan",
    ),
    "infinite": (lambda: ModelConfig(residual_clip=float("inf")), "model.residual_clip: must be finite, got inf"),
    "no layers": (lambda: ModelConfig(num_layers=0), "model.num_layers: must be at least 1, got 0"),
    "key heads": (
        lambda: ModelConfig(num_heads=6, num_kv_heads=4, head_dim=8),
        "model.num_kv_heads: 4 does not divide num_heads=6",
    ),
    "heads": (lambda: ModelConfig(width=128, num_heads=5), "model.num_heads: 5 does not divide width=128"),
    "odd head size": (
        lambda: ModelConfig(width=132, num_heads=12),
        "model.head_dim: rotary positions need an even number of channels, got 11",
    ),
    "positive gamma": (lambda: ModelConfig(clip_gamma=0.1), "model.clip_gamma: must be at most 0, got 0.1"),
    "router without wiring": (
        lambda: ModelConfig(preset="residual", router="static"),
        "model.router: wiring=residual goes with router=none",
    ),
    "wiring without router": (
        lambda: ModelConfig(router="none"),
        "model.router: wiring=cumulative goes with router=projected or static, got none",
    ),
    "pattern that does not divide": (
        lambda: ModelConfig(num_layers=5, layer_pattern=(LayerPattern(), LayerPattern(window=4))),
        "model.layer_pattern: 2 entries do not divide num_layers=5; take a multiple of 2 layers or another pattern",
    ),
    "pattern of something else": (
        lambda: ModelConfig(layer_pattern=(4, 0)),
        "model.layer_pattern: expected LayerPattern(window=..., rope_theta=...), got 4",
    ),
    "unknown scaling": (
        lambda: RopeScaling(kind="lama3"),
        "model.rope_scaling.kind: unknown name 'lama3' (did you mean 'llama3'?); allowed: linear, llama3, yarn, "
        "longrope",
    ),
    "scaling without its length": (
        lambda: RopeScaling(kind="yarn", factor=4.0),
        "model.rope_scaling.original_length: must be at least 1, got 0",
    ),
    "factors of another head": (
        lambda: ModelConfig(
            rope_scaling=RopeScaling(kind="longrope", original_length=8, short_factors=(1,), long_factors=(1,))
        ),
        "model.rope_scaling: longrope needs a factor for each of the 16 frequencies, got 1",
    ),
    "no channel turns": (
        lambda: ModelConfig(rope_fraction=0.0),
        "model.rope_fraction: must lie above 0 and not above 1, got 0.0",
    ),
    "blocks without delta": (lambda: ModelConfig(blocks=2), "model.blocks: only wiring=delta has blocks"),
    "output norm without delta": (
        lambda: ModelConfig(preset="oasis", output_norm=True),
        "model.output_norm: goes with wiring=delta, got wiring=cumulative",
    ),
    "three routers without delta": (
        lambda: ModelConfig(preset="oasis", router="qkv"),
        "model.router: wiring=cumulative goes with router=projected or static, got qkv",
    ),
    "fixed beta without coupling": (
        lambda: ModelConfig(preset="softmax1", fixed_beta=1.0),
        "model.fixed_beta: goes with coupling=True, got 1.0 without",
    ),
    "too many blocks": (
        lambda: ModelConfig(preset="oasis_blocks", num_layers=3),
        "model.blocks: 8 blocks for 6 sublayers",
    ),
    "files without a pattern": (lambda: DataConfig(corpus="files"), "data.pattern: corpus=files needs a glob"),
    "prepared without a folder": (lambda: DataConfig(corpus="prepared"), "data.pattern: corpus=prepared needs the"),
    "share of 1": (
        lambda: DataConfig(holdout_fraction=1.0),
        "data.holdout_fraction: must be above 0 and at most 0.9, got 1.0",
    ),
    "mesh of nothing": (lambda: MeshConfig(data=0), "mesh.data: must be -1 or at least 1, got 0"),
    "accumulation": (
        lambda: Config(optimizer=OptimizerConfig(accumulation_steps=3)),
        "optimizer.accumulation_steps: 3 does not divide data.batch_size=16",
    ),
    "inputs of the corpus": (
        lambda: Config(data=DataConfig(corpus="trigger")),
        "model.inputs: corpus=trigger needs inputs=vectors, got tokens",
    ),
    "attention alone": (lambda: AttentionConfig(num_heads=7), "attention.num_heads: 7 does not divide width=128"),
    "router alone": (
        lambda: RouterConfig(router="statics"),
        "router.router: unknown name 'statics' (did you mean 'static'?)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_told_in_one_line(case):
    build, expected = WRONG[case]
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


OUTSIDE = {
    "optimizer.beta1": (1.0, -0.1), "optimizer.beta2": (1.0, 2.0), "optimizer.epsilon": (-1e-8, 1.5),
    "optimizer.final_fraction": (1.1, -0.1), "optimizer.weight_decay": (-0.1,), "optimizer.warmup_steps": (-1, 2**40),
    "data.holdout_fraction": (0.999999, 0.0), "data.trigger_rate": (1.0,), "data.batch_size": (0, 10**30),
    "model.clip_alpha": (-1.0,), "model.norm_epsilon": (1e30, -1e-9), "model.residual_clip": (1e-40, -1.0),
    "model.null_weight": (1.5,), "model.width": (10**30,), "model.num_layers": (10**12, 4097), "run.seed": (-1,),
    "run.steps": (0, 10**5000),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_numbers_that_make_no_sense_are_refused_by_field(name):
    """The same in Python and from the command line."""
    section, field = name.split(".")
    for value in OUTSIDE[name]:
        with pytest.raises(UserError, match=f"^{name}: must ") as direct:
            dataclasses.replace(getattr(Config(), section), **{field: value})
        assert "\n" not in str(direct.value) and len(str(direct.value)) < 200
        if value != 10**5000:
            with pytest.raises(UserError) as typed:
                apply_overrides(Config(), [f"{name}={value}"])
            assert str(typed.value) == str(direct.value)


def test_a_number_of_thousands_of_digits_is_refused_in_a_short_line():
    for text in ("9" * 5000, "-" + "9" * 5000, "1e9999"):
        with pytest.raises(UserError, match=r"^run.steps: ") as error:
            apply_overrides(Config(), [f"run.steps={text}"])
        assert len(str(error.value)) < 200


def test_ranges_stand_in_the_help():
    assert "; at least 0 and below 1" in " ".join(describe_fields(160, ["optimizer.beta1"]).split())
