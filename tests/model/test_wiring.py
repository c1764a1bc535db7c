"""Schedules against who reads what by definition, and the executor step by step against numpy with made-up
sublayers.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model import oracle

from oasis_jax import Context, ModelConfig, Router, UserError
from oasis_jax.config import PRESETS
from oasis_jax.model import unrolled
from oasis_jax.model.layer import Sublayer
from oasis_jax.model.router import MAX_BETA
from oasis_jax.model.unrolled import run_unrolled
from oasis_jax.model.wiring import schedule

B, T, D, LAYERS = 2, 3, 7, 3
TINY = dict(width=D, num_heads=1, head_dim=2)
# (layers, blocks): by definition, how many sublayers each block sums.
SIZES = {
    (3, 0): [1] * 6,
    (3, 1): [6],
    (3, 2): [3, 3],
    (3, 4): [2, 2, 1, 1],
    (4, 3): [3, 3, 2],
    (4, 8): [1] * 8,
    (5, 8): [2, 2, 1, 1, 1, 1, 1, 1],
    (7, 4): [4, 4, 3, 3],
}


def delta(layers, blocks):
    return ModelConfig(preset="attnres", num_layers=layers, blocks=blocks, **TINY)


def sublayers(config):
    return [f"layer{layer}.{kind}" for layer in range(config.num_layers) for kind in ("attention", "mlp")]


def played(config):
    """What each router reads when the steps are carried out on words: {router: words of its sources}, and the last
    stream.
    """
    slots, stream, reads = ["x"], "x", {}
    for step in schedule(config).steps:
        output = f"{step.name}({stream})"
        source = output if config.wiring == "delta" else f"{stream} + {output}"
        if step.members:
            source = f"{slots[step.slot]} + {source}"
        if not step.routers:
            stream = source
            continue
        slots = [*slots[: step.slot], source]
        assert len(slots) == step.slot + 1 <= schedule(config).num_slots
        (router,) = step.routers
        reads[router], stream = slots, f"<{router}>"
        if step.stream_slot is not None:
            slots = [*slots[: step.stream_slot], stream]
    return reads, stream


@pytest.mark.parametrize("layers, blocks", SIZES)
def test_delta_sums_sublayers_into_blocks(layers, blocks):
    config, names = delta(layers, blocks), sublayers(delta(layers, blocks))
    ends = np.cumsum(SIZES[layers, blocks])
    expected, outputs, stream = {}, [], "x"
    for index, router in enumerate([*names[1:], "final"]):
        outputs.append(f"{names[index]}({stream})")
        sums = [" + ".join(outputs[a:b]) for a, b in zip([0, *ends], ends)]
        expected[router] = ["x", *filter(None, sums)]
        stream = f"<{router}>"
    assert played(config) == (expected, stream)
    assert schedule(config).num_slots == 1 + len(ends)


def test_cumulative_routes_both_candidates_with_the_streams_after_all_layers_before():
    config = ModelConfig(preset="oasis", num_layers=LAYERS, **TINY)
    expected, stream, history = {}, "x", ["x"]
    for layer in range(LAYERS):
        a = f"{stream} + layer{layer}.attention({stream})"
        expected[f"layer{layer}.attention"] = [*history, a]
        stream = f"<layer{layer}.attention>"
        m = f"{stream} + layer{layer}.mlp({stream})"
        expected[f"layer{layer}.mlp"] = [*history, a, m]
        stream = f"<layer{layer}.mlp>"
        history.append(stream)
    assert played(config) == (expected, stream)
    assert [len(sources) for sources in expected.values()] == [2, 3, 3, 4, 4, 5]
    assert schedule(config).num_slots == LAYERS + 2


def test_residual_has_no_routers():
    config = ModelConfig(preset="residual", num_layers=1, **TINY)
    first = "x + layer0.attention(x)"
    assert played(config) == ({}, f"{first} + layer0.mlp({first})")
    assert schedule(config).routers == [] and schedule(config).columns == []


def test_sources_say_their_names_and_the_layers_they_stem_from():
    steps = schedule(delta(3, 4)).steps  # sublayers 0-1, 2-3, 4, 5
    assert [step.sources for step in steps[:3]] == [
        (("embedding", ()), ("block1", (0,))),
        (("embedding", ()), ("block1", (0,))),
        (("embedding", ()), ("block1", (0,)), ("block2", (1,))),
    ]
    assert steps[-1].sources[1:] == (("block1", (0,)), ("block2", (1,)), ("block3", (2,)), ("block4", (2,)))
    assert schedule(delta(3, 2)).steps[-1].sources[1:] == (("block1", (0, 1)), ("block2", (1, 2)))
    assert schedule(delta(3, 1)).steps[-1].sources[1:] == (("block1", (0, 1, 2)),)
    assert schedule(delta(2, 0)).steps[-1].sources == (
        ("embedding", ()), ("layer0.attention", (0,)), ("layer0.mlp", (0,)), ("layer1.attention", (1,)),
        ("layer1.mlp", (1,)),
    )  # fmt: skip
    cumulative = schedule(ModelConfig(preset="oasis", num_layers=3, **TINY)).steps
    assert cumulative[5].sources == (
        ("embedding", ()), ("layer0", (0,)), ("layer1", (1,)), ("own attention", (2,)), ("own mlp", (2,))
    )  # fmt: skip
    assert cumulative[4].sources == cumulative[5].sources[:-1]


def test_current_counts_what_the_layer_or_sublayer_itself_made():
    cumulative = schedule(ModelConfig(preset="oasis", num_layers=2, **TINY))
    assert [step.current for step in cumulative.steps] == [1, 2, 1, 2]
    assert [step.current for step in schedule(delta(2, 3)).steps] == [1] * 4


def test_columns_are_all_sources_with_the_own_ones_last():
    assert schedule(ModelConfig(preset="oasis", num_layers=2, **TINY)).columns == [
        "embedding", "layer0", "own attention", "own mlp"
    ]  # fmt: skip
    assert schedule(delta(3, 4)).columns == ["embedding", "block1", "block2", "block3", "block4"]
    assert schedule(delta(1, 0)).columns == ["embedding", "layer0.attention", "layer0.mlp"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_schedule_fits_together(preset):
    config = ModelConfig(preset=preset, num_layers=5)
    found = schedule(config)
    assert found is schedule(ModelConfig(preset=preset, num_layers=5))
    assert found.sublayers == sublayers(config)
    for index, step in enumerate(found.steps):
        assert (step.index, f"layer{step.layer}.{step.kind}") == (index, step.name)
        assert len(step.sources) == (step.slot + 1 if step.routers else 0)
        assert found.routers[step.first_router :][: len(step.routers)] == [*step.routers]
    if config.wiring != "residual":
        assert config.router == "qkv" or found.routers == (
            found.sublayers if config.wiring == "cumulative" else [*found.sublayers[1:], "final"]
        )
        assert found.num_slots == 1 + max(step.slot for step in found.steps)
        columns = list(dict.fromkeys(source.name for step in found.steps for source in step.sources))
        assert sorted(columns) == sorted(found.columns)


# The executor, with sublayers that are easy to write down twice.


def numpy_sublayer(index, h):
    """A made-up sublayer and its layer's evidence."""
    return np.tanh(h * (index + 1) + 0.1 * index), 1 / (1 + np.exp(-(h.sum(-1) + index // 2)))


@pytest.fixture
def made_up(monkeypatch):
    """The same in place of attention and MLP; an MLP's evidence is its layer's, made when the attention ran."""

    def attend(layer, config, h, context):
        index = layer["index"]
        psi = jax.nn.sigmoid(h.sum(-1) + index // 2)
        statistics = types.SimpleNamespace(null_mass=jnp.stack([psi - 0.1, psi + 0.1], axis=1))  # of two heads
        return Sublayer(jnp.tanh(h * (index + 1) + 0.1 * index), h, statistics)

    def feed(layer, config, h, context):
        index = layer["index"] + 1
        return Sublayer(jnp.tanh(h * (index + 1) + 0.1 * index), h, None)

    monkeypatch.setattr(unrolled, "SUBLAYERS", {"attention": attend, "mlp": feed})


def parameters_of(config):
    rng = np.random.default_rng(5)
    names = schedule(config).routers
    shapes = Router(config, rngs=nnx.Rngs(0)).parameters if names else {}
    routers = {i: {name: rng.normal(size=x.shape) for name, x in shapes.items()} for i in range(len(names))}
    return {"layers": {i: {"index": 2 * i} for i in range(LAYERS)}, "routers": routers}


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="oasis"),
        dict(preset="attnres_cumulative"),
        dict(preset="oasis", router="static"),
        dict(preset="attnres"),
        dict(preset="oasis_blocks", blocks=0),
        dict(preset="oasis_blocks", blocks=2),
        dict(preset="oasis_blocks", blocks=4),  # 6 sublayers: blocks of 2, 2, 1, 1
        dict(preset="oasis_blocks", blocks=1, router="projected"),
        dict(preset="residual"),
        dict(preset="residual", residual_clip=0.5),
        dict(preset="oasis", residual_clip=0.5),
        dict(preset="oasis_blocks", blocks=4, residual_clip=0.5),
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_unrolled_matches_the_oracle(options, made_up):
    config = ModelConfig(**TINY, num_layers=LAYERS, **options)
    x = np.random.default_rng(6).normal(size=(B, T, D))
    seen, psis = {}, []

    def sublayer(index, h):
        output, psi = numpy_sublayer(index, h)
        psis.extend([psi] if index % 2 == 0 else [])
        return output, psis[-1]

    def route(index, name, sources, evidence):
        output, weights, null_mass = oracle.route(parameters["routers"][index], config, sources, evidence)
        seen[name] = (weights, null_mass)
        return output

    with jax.enable_x64(True):
        parameters = parameters_of(config)
        arrays = {"layers": parameters["layers"], "routers": jax.tree.map(jnp.asarray, parameters["routers"])}
        result = run_unrolled(arrays, config, jnp.asarray(x), Context())
        streams = getattr(oracle, config.wiring)(config, x, sublayer, route)
        assert np.abs(streams[-1] - x).max() > 0.1
        np.testing.assert_allclose(result.stream, streams[-1], rtol=1e-10, atol=1e-12)
        assert list(result.routers) == list(seen) == schedule(config).routers
        for name, (weights, null_mass) in seen.items():
            np.testing.assert_allclose(result.routers[name].weights, weights, atol=1e-10)
            np.testing.assert_allclose(result.routers[name].null_mass, null_mass, atol=1e-10)
        for layer, stream in zip(result.layers, streams[2::2], strict=True):
            np.testing.assert_allclose(layer.layer_output, stream, rtol=1e-10, atol=1e-12)


def test_observers_are_called_in_order_and_decide_what_stays(made_up):
    config, events = ModelConfig(preset="oasis", num_layers=LAYERS, **TINY), []

    def on_layer(index, layer):
        events.append(index)
        return layer.attention_norm.shape

    def on_router(name, router):
        events.append(name)
        return router.weights.shape[-1]

    parameters = jax.tree.map(jnp.asarray, parameters_of(config))
    result = run_unrolled(parameters, config, jnp.ones((B, T, D)), Context(), on_layer=on_layer, on_router=on_router)
    assert events == [x for i in range(LAYERS) for x in (f"layer{i}.attention", f"layer{i}.mlp", i)]
    assert result.layers == [(B, T, D)] * LAYERS
    assert list(result.routers.values()) == [2, 3, 3, 4, 4, 5]


# The router alone.


def test_beta_is_bounded_and_absent_without_coupling():
    config = ModelConfig(preset="oasis", **TINY)
    router = Router(config, rngs=nnx.Rngs(0))
    sources, evidence = [jnp.ones((B, T, D)), jnp.zeros((B, T, D))], [jnp.zeros((B, T)), jnp.ones((B, T))]
    np.testing.assert_allclose(router(sources, evidence)[1].beta, np.log1p(np.exp(-5.0)), rtol=1e-6)
    router.beta_raw[...] = jnp.float32(1e3)
    assert float(router(sources, evidence)[1].beta) == MAX_BETA
    plain = Router(config.with_preset("attnres_cumulative"), rngs=nnx.Rngs(0))
    assert plain(sources, evidence)[1].beta is None and "beta_raw" not in plain.names


def test_gradient_reaches_the_evidence_through_the_coupling():
    config = ModelConfig(preset="oasis", **TINY)
    router = Router(config, rngs=nnx.Rngs(0))
    sources = [jax.random.normal(jax.random.key(i), (B, T, D)) for i in range(3)]
    gradient = jax.grad(lambda psi: router(sources, [jnp.zeros((B, T)), psi, 0.3 * psi])[0].sum())(
        jnp.full((B, T), 0.4)
    )
    assert float(jnp.abs(gradient).min()) > 0


def test_more_blocks_than_sublayers_is_refused():
    with pytest.raises(UserError, match="9 blocks for 8 sublayers"):
        ModelConfig(preset="oasis_blocks", num_layers=4, blocks=9)
