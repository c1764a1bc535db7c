"""The modules inside somebody else's small models: one NNX, one Linen; each trains a few steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from oasis_jax import Attention, AttentionConfig, Router, RouterConfig, linen

WIDTH, CLASSES = 20, 6
ATTENTION = AttentionConfig(width=WIDTH, num_heads=5, normalizer="softmax1")
ROUTER = RouterConfig(width=WIDTH, router="projected", depth_normalizer="softmax1", coupling=True)
INPUTS = jax.random.normal(jax.random.key(0), (3, 7, WIDTH))
LABELS = jax.random.randint(jax.random.key(1), (3, 7), 0, CLASSES)


class ForeignNNX(nnx.Module):
    """Two attention layers and a router over (input, first, second)."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = Attention(ATTENTION, rngs=rngs), Attention(ATTENTION, rngs=rngs)
        self.router = Router(ROUTER, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        a, first = self.first(x)
        b, second = self.second(x + a)
        evidence = [jnp.zeros(x.shape[:2]), first.null_mass.mean(1), second.null_mass.mean(1)]
        h, _ = self.router([x, x + a, x + a + b], evidence)
        return self.head(h)


class ForeignLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, first = linen.Attention(ATTENTION)(x)
        b, second = linen.Attention(ATTENTION)(x + a)
        evidence = [jnp.zeros(x.shape[:2]), first.null_mass.mean(1), second.null_mass.mean(1)]
        h, _ = linen.Router(ROUTER)([x, x + a, x + a + b], evidence)
        return nn.Dense(CLASSES)(h)


def train(apply, parameters, steps=20):
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(parameters, state):
        def loss(parameters):
            return optax.softmax_cross_entropy_with_integer_labels(apply(parameters), LABELS).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    state, losses = optimizer.init(parameters), []
    for _ in range(steps):
        parameters, state, loss = step(parameters, state)
        losses.append(float(loss))
    return losses


def test_in_a_foreign_nnx_model():
    graphdef, parameters = nnx.split(ForeignNNX(nnx.Rngs(0)))
    losses = train(lambda p: nnx.merge(graphdef, p)(INPUTS), parameters)
    assert losses[-1] < 0.5 * losses[0]


def test_with_the_nnx_optimizer_and_transforms():
    model = ForeignNNX(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(
            lambda m: optax.softmax_cross_entropy_with_integer_labels(m(INPUTS), LABELS).mean()
        )(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_in_a_foreign_linen_model():
    model = ForeignLinen()
    params = model.init(jax.random.key(0), INPUTS)
    losses = train(lambda p: model.apply(p, INPUTS), params)
    assert losses[-1] < 0.5 * losses[0]
