"""The feed-forward layer."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.config import MLPConfig
from oasis_jax.model.context import Context
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, constant, matrix

_NO_CONTEXT = Context()

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def hadamard(size: int) -> Float[np.ndarray, "S S"]:
    """The orthogonal, symmetric Hadamard matrix of a power of two (Sylvester)."""
    found = np.ones((1, 1))
    while len(found) < size:
        found = np.block([[found, found], [found, -found]]) * 0.5**0.5
    return found


def rotate_blocks(x: Float[Array, "*batch F"], size: int) -> Float[Array, "*batch F"]:
    """Blocks of `size` channels times a Hadamard matrix, summed in float32 or better; x's type."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    matrix = jnp.asarray(hadamard(size), x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...F,FG->...G", blocks, matrix, preferred_element_type=wide).astype(x.dtype).reshape(x.shape)


def mlp_parameters(config: MLPConfig) -> dict[str, ParameterSpec]:
    """Up and down projections, the gate's where there is one, and their biases where the config asks for them."""
    width, hidden = config.width, config.mlp_size
    specs = {"gate": matrix((width, hidden), ("embed", "mlp"), width)} if config.mlp_gated else {}
    specs |= {
        "up": matrix((width, hidden), ("embed", "mlp"), width),
        "down": matrix((hidden, width), ("mlp", "embed"), hidden),
    }
    if config.mlp_bias:
        biases = {"gate": ((hidden,), ("mlp",)), "up": ((hidden,), ("mlp",)), "down": ((width,), (None,))}
        specs |= {f"{name}_bias": constant(biases[name][0], 0.0, "bias", biases[name][1]) for name in list(specs)}
    return specs


def mlp(
    parameters: Parameters, config: MLPConfig, x: Float[Array, "B T D"], context: Context = _NO_CONTEXT
) -> Float[Array, "B T D"]:
    """W_down a(W_up x), or gated W_down (a(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202), in x's type.

    Args:
      parameters: as `mlp_parameters(config)` lists them.
      config: an MLPConfig, or a ModelConfig.
      x: [B, T, D], normed already.
      context: see Context.
    """
    x = context.constrain(x, "batch", "length", None)
    p = {name: value.astype(x.dtype) for name, value in parameters.items()}

    def project(name: str, equation: str, y: Array) -> Array:
        z = context.numerics.einsum(name, equation, y, p[name])
        return z + p[f"{name}_bias"] if config.mlp_bias else z

    activation = ACTIVATIONS[config.mlp_activation]
    if config.mlp_gated:
        hidden = activation(project("gate", "BTD,DF->BTF", x)) * project("up", "BTD,DF->BTF", x)
    else:
        hidden = activation(project("up", "BTD,DF->BTF", x))
    if config.mlp_rotation:
        hidden = rotate_blocks(hidden, config.mlp_rotation)
    hidden = context.constrain(hidden, "batch", "length", "mlp")
    return context.constrain(project("down", "BTF,FD->BTD", hidden), "batch", "length", None)


class MLP(ParameterModule):
    """`mlp` with its parameters, as an NNX module: `MLP(MLPConfig(width=256), rngs=rngs)`."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        super().__init__(mlp_parameters(config), rngs=rngs)
        self.config = config

    def __call__(self, x: Float[Array, "B T D"], context: Context = _NO_CONTEXT) -> Float[Array, "B T D"]:
        """See `mlp`."""
        return mlp(self.parameters, self.config, x, context)
