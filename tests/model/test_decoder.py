"""The decoder: every preset trains, nothing looks ahead, statistics and axes are complete."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sampling import sampled

from oasis_jax import PRESETS, Context, Decoder, ModelConfig, Placement, UserError
from oasis_jax.model.statistics import layer_telemetry, telemetry
from oasis_jax.model.wiring import schedule

B, T, VOCAB = 2, 11, 29
SMALL = dict(width=24, num_heads=3, num_layers=4, mlp_dim=40, vocab_size=VOCAB)


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, VOCAB)


@pytest.mark.parametrize("preset", sampled(PRESETS, ("residual", "attnres", "oasis", "oasis_blocks", "token_null")))
def test_every_preset_trains(preset):
    model = Decoder(ModelConfig(preset=preset, **SMALL), rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(model)
    inputs = tokens()
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(parameters, state):
        def loss(parameters):
            logits, _ = nnx.merge(graphdef, parameters)(inputs[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, inputs[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value, gradients

    state = optimizer.init(parameters)
    losses = []
    for index in range(12):
        parameters, state, loss, gradients = step(parameters, state)
        losses.append(float(loss))
        if index == 1:  # static queries start at zero, so a first gradient may be zero; a second is not
            flat = {path: float(jnp.abs(g[...]).max()) for path, g in nnx.to_flat_state(gradients)}
            assert all(value > 0 for value in flat.values()), [path for path, value in flat.items() if not value > 0]
    chex.assert_tree_all_finite(losses)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("preset", ["residual", "oasis", "oasis_blocks", "attnres"])
def test_outputs_do_not_depend_on_later_tokens(preset):
    options = dict(learned_positions=T, normalizer="token_null") if preset == "residual" else {}
    model = Decoder(ModelConfig(preset=preset, **SMALL, **options), rngs=nnx.Rngs(0))
    inputs = tokens()
    changed = inputs.at[:, 7:].set((inputs[:, 7:] + 1) % VOCAB)
    first, second = model(inputs)[0], model(changed)[0]
    np.testing.assert_allclose(first[:, :7], second[:, :7], atol=1e-5)
    assert float(jnp.abs(first[:, 7:] - second[:, 7:]).max()) > 1e-3


@pytest.mark.parametrize(
    "options", [dict(preset="oasis"), dict(preset="oasis_blocks", blocks=3)], ids=lambda o: o["preset"]
)
def test_remat_changes_no_value(options):
    inputs = tokens()
    options = SMALL | dict(num_layers=2) | options

    def value_and_grad(remat):
        graphdef, parameters = nnx.split(Decoder(ModelConfig(remat=remat, **options), rngs=nnx.Rngs(0)))
        return jax.jit(jax.value_and_grad(lambda p: (nnx.merge(graphdef, p)(inputs)[0] ** 2).mean()))(parameters)

    chex.assert_trees_all_close(value_and_grad("none"), value_and_grad("layer"), rtol=1e-5, atol=1e-6)


def test_statistics_have_the_promised_shapes():
    config = ModelConfig(preset="oasis", num_kv_heads=1, **SMALL)
    logits, statistics = Decoder(config, rngs=nnx.Rngs(0))(tokens())
    assert logits.shape == (B, T, VOCAB) and logits.dtype == jnp.float32
    assert len(statistics.attention) == 4 and list(statistics.routers) == schedule(config).routers
    layer = statistics.attention[0]
    chex.assert_shape([layer.query, layer.head_output], (B, T, 3, 8))
    chex.assert_shape([layer.key, layer.value], (B, T, 1, 8))
    chex.assert_shape([layer.null_mass, layer.first_token_mass, layer.lse], (B, 3, T))
    assert {name: len(tap) for name, tap in statistics.taps.items()} == dict(
        attention_norm=4, attention_output=4, mlp_norm=4, mlp_output=4, layer_output=4, final_norm=1
    )
    chex.assert_shape([x for tap in statistics.taps.values() for x in tap], (B, T, 24))
    table = Decoder(config, rngs=nnx.Rngs(0)).embedding.table[...]
    np.testing.assert_allclose(logits, statistics.taps["final_norm"][0] @ table[:VOCAB].T, atol=1e-5)


def test_telemetry_is_the_mean_of_the_statistics():
    _, statistics = Decoder(ModelConfig(preset="oasis", **SMALL), rngs=nnx.Rngs(0))(tokens())
    layers = jax.tree.map(lambda *x: jnp.stack(x), *map(layer_telemetry, statistics.attention))
    scalars = telemetry(layers, {name: router.beta for name, router in statistics.routers.items()})
    expected = np.mean([np.mean(layer.null_mass) for layer in statistics.attention])
    np.testing.assert_allclose(scalars["null_mass"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        scalars["first_token_mass/layer2"], np.mean(statistics.attention[2].first_token_mass), rtol=1e-6
    )
    np.testing.assert_allclose(scalars["beta/layer1.mlp"], np.log1p(np.exp(-5.0)), rtol=1e-5)
    np.testing.assert_allclose(scalars["beta"], np.log1p(np.exp(-5.0)), rtol=1e-5)
    assert len(scalars) == 2 * (1 + 4) + 1 + 8
    assert not [name for name in telemetry(layers, {}) if name.startswith("beta")]


def test_vectors_in_vectors_out():
    config = ModelConfig(preset="residual", inputs="vectors", vector_dim=5, width=24, num_heads=3)
    outputs, _ = Decoder(config, rngs=nnx.Rngs(0))(jnp.ones((B, T, 5)))
    assert outputs.shape == (B, T, 5)


def test_the_placement_sees_every_activation_with_names_for_all_dimensions():
    seen = []

    class Noting(Placement):
        def constrain(self, x, axes):
            assert len(axes) == x.ndim
            seen.append(axes)
            return x

    Decoder(ModelConfig(preset="oasis", **SMALL), rngs=nnx.Rngs(0))(tokens(), Context(placement=Noting()))
    names = {name for axes in seen for name in axes if name}
    assert {"heads", "kv_heads", "mlp", "vocab", "batch", "length", "stream"} <= names


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(vocab_size=0), "model.vocab_size: must be set"),
        (dict(attention_implementation="xl"), "did you mean 'xla'"),
        (dict(depth_implementation="nope"), "allowed: auto, "),
    ],
)
def test_what_cannot_be_built_says_so(options, words):
    with pytest.raises(UserError, match=words):
        Decoder(ModelConfig(**(SMALL | options)), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "inputs, got",
    [
        (np.zeros((2, 3), np.float32), "float32 of shape (2, 3)"),
        (np.zeros((2, 3, 4), np.int32), "int32 of shape (2, 3, 4)"),
        (np.zeros(3, np.int32), "int32 of shape (3,)"),
    ],
)
def test_inputs_of_another_kind_are_refused(inputs, got):
    model = Decoder(ModelConfig(preset="residual", **SMALL), rngs=nnx.Rngs(0))
    with pytest.raises(UserError) as error:
        model(inputs)
    assert str(error.value) == (f"inputs: must be whole numbers [batch, length] for model.inputs=tokens, got {got}")


def test_multipliers_scale_embedding_sublayers_and_logits():
    """One at a time; without a norm each is seen in the first array after it."""
    base = dict(SMALL, preset="residual", norm="none", num_layers=1)
    run = lambda **options: Decoder(ModelConfig(**base, **options), rngs=nnx.Rngs(0))(tokens())
    (logits, plain), (tripled, _) = run(), run(logits_multiplier=3.0)
    np.testing.assert_allclose(tripled, 3 * logits, rtol=1e-6)
    halved = run(residual_multiplier=0.5)[1].taps
    np.testing.assert_allclose(halved["attention_output"][0], 0.5 * plain.taps["attention_output"][0], rtol=1e-5)
    embedded = run(embedding_multiplier=4.0)[1].taps
    np.testing.assert_allclose(embedded["attention_norm"][0], 4 * plain.taps["attention_norm"][0], rtol=1e-6)
