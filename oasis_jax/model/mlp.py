"""The SwiGLU feed-forward layer."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.model.attention import Constrain, unconstrained
from oasis_jax.model.numerics import FLOAT, Numerics
from oasis_jax.model.parameters import ParameterModule, Parameters, ParameterSpec, matrix


def mlp_parameters(width: int, hidden: int) -> dict[str, ParameterSpec]:
    """Gate, up and down projections."""
    return {
        "gate": matrix((width, hidden), ("embed", "mlp"), width),
        "up": matrix((width, hidden), ("embed", "mlp"), width),
        "down": matrix((hidden, width), ("mlp", "embed"), hidden),
    }


def mlp(
    parameters: Parameters,
    x: Float[Array, "B T D"],
    *,
    constrain: Constrain = unconstrained,
    numerics: Numerics = FLOAT,
) -> Float[Array, "B T D"]:
    """W_down (silu(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202), in x's type."""
    x = constrain(x, ("batch", "length", None))
    p = {name: value.astype(x.dtype) for name, value in parameters.items()}
    gate, up = (numerics.einsum(name, "BTD,DF->BTF", x, p[name]) for name in ("gate", "up"))
    hidden = jax.nn.silu(gate) * up
    hidden = constrain(hidden, ("batch", "length", "mlp"))
    return constrain(numerics.einsum("down", "BTF,FD->BTD", hidden, p["down"]), ("batch", "length", None))


class MLP(ParameterModule):
    """`mlp` with its parameters, as an NNX module."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        super().__init__(mlp_parameters(width, hidden), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], **options) -> Float[Array, "B T D"]:
        """See `mlp` for the options."""
        return mlp(self.parameters, x, **options)
