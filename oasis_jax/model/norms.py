"""Norms over the model width: one function and one table of parameters per name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.config import NormConfig
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, constant, matrix

GATE_RANK = 16  # width of gatednorm's bottleneck (arXiv 2601.22966)

Activations = Float[Array, "*batch D"]


def rms_norm(x: Activations, scale: Float[Array, " D"], epsilon: float = 1e-6) -> Activations:
    """x / sqrt(mean(x^2) + epsilon) * scale; the statistics in float32 or better, the result in x's type."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype)


def _rmsnorm(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    return rms_norm(x, parameters["scale"], config.norm_epsilon)


def _layernorm(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al., arXiv 1607.06450)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + config.norm_epsilon)
    return (centred * inverse * parameters["scale"] + parameters["bias"]).astype(x.dtype)


def _preaffine(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    """RMSNorm(l1 * x) (Unified View, arXiv 2601.22966)."""
    return rms_norm(x * parameters["pre_scale"].astype(x.dtype), parameters["scale"], config.norm_epsilon)


def _gatednorm(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    """y * sigmoid(W_up swish(W_down y)), y = RMSNorm(x) (Unified View, arXiv 2601.22966)."""
    y = rms_norm(x, parameters["scale"], config.norm_epsilon)
    hidden = jax.nn.silu(y @ parameters["gate_down"].astype(y.dtype))
    return y * jax.nn.sigmoid(hidden @ parameters["gate_up"].astype(y.dtype))


def _dyt(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    """gamma * tanh(alpha * x) + beta (Zhu et al., arXiv 2503.10622)."""
    del config
    squashed = jnp.tanh(parameters["alpha"] * x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return (parameters["scale"] * squashed + parameters["shift"]).astype(x.dtype)


def _identity(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    del parameters, config
    return x


NORMS: dict[str, Callable[[Parameters, NormConfig, Activations], Activations]] = {
    "rmsnorm": _rmsnorm,
    "layernorm": _layernorm,
    "preaffine": _preaffine,
    "gatednorm": _gatednorm,
    "dyt": _dyt,
    "none": _identity,
}


def norm_parameters(config: NormConfig, width: int) -> dict[str, ParameterSpec]:
    """The parameters of the norm that `config.norm` names, over `width` channels."""
    scale = {"scale": constant((width,), 1.0, "norm")}
    rank = GATE_RANK
    return {
        "rmsnorm": scale,
        "layernorm": scale | {"bias": constant((width,), 0.0, "bias")},
        "preaffine": scale | {"pre_scale": constant((width,), 1.0, "norm")},
        "gatednorm": scale
        | {
            "gate_down": matrix((width, rank), ("embed", None), width),
            "gate_up": matrix((rank, width), (None, "embed"), rank),
        },
        "dyt": scale | {"alpha": constant((), 0.5, "norm"), "shift": constant((width,), 0.0, "bias")},
        "none": {},
    }[config.norm]


def norm(parameters: Parameters, config: NormConfig, x: Activations) -> Activations:
    """The norm that `config.norm` names, over the last axis.

    Args:
      parameters: as `norm_parameters` lists them.
      config: a NormConfig, or a ModelConfig.
      x: [..., D].

    Returns:
      [..., D] in x's type.
    """
    return NORMS[config.norm](parameters, config, x)


class Norm(ParameterModule):
    """`norm` with its parameters, as an NNX module over `width` channels."""

    def __init__(self, config: NormConfig, width: int, *, rngs: nnx.Rngs):
        super().__init__(norm_parameters(config, width), rngs=rngs)
        self.config = config

    def __call__(self, x: Activations) -> Activations:
        return norm(self.parameters, self.config, x)
