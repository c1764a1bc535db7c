"""How the weight of a linear layer becomes codes: to the nearest, by GPTQ, after SmoothQuant, AWQ or a rotation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oasis_jax.evaluation.quantization.quantizers import Codes, grouped, symmetric, symmetric_mse
from oasis_jax.evaluation.quantization.schemes import Scheme
from oasis_jax.model.mlp import rotate_blocks

SMOOTHING = 0.5  # SmoothQuant's alpha (arXiv 2211.10438)
AWQ_POWERS = 20  # candidates between 0 and 1 (arXiv 2306.00978, section 3.2)
GPTQ_DAMPING = 0.01  # of the mean of the diagonal (arXiv 2210.17323, section 3.3)
GPTQ_BLOCK = 128  # terms of the contraction between two updates of all that follow
ROTATION_BLOCK = 512  # the largest
ROTATION_SEED = 0


class Rounded(NamedTuple):
    """A weight as codes, None: it stays float; and what the layer's input is divided by, None: nothing."""

    codes: Codes | None
    factors: Float[Array, " D"] | None


def round_weight(
    scheme: Scheme,
    weight: Float[Array, "D M"],
    channels: Float[Array, " D"] | None = None,
    products: Float[Array, "D D"] | None = None,
) -> Rounded:
    """The weight of a linear layer under a scheme.

    Args:
      weight: the contraction first; in float32.
      channels, products: of the layer's input, as `Recorded` has them, turned where the scheme rotates; what a scheme
        does not read may be None.
    """
    weight = turned(weight.T).T if scheme.rotate else weight
    factors = None
    if scheme.smooth:
        factors = smoothing_factors(channels, weight)
    elif scheme.awq:
        factors = awq_factors(scheme, weight, products)
    if scheme.weights is None:
        return Rounded(None, factors)
    weight = weight if factors is None else weight * factors[:, None]
    codes = _nearest(scheme, weight)
    if scheme.gptq:
        scaled = products if factors is None else products / factors[:, None] / factors
        codes = gptq(scheme, weight, codes, scaled)
    return Rounded(codes, factors)


def _nearest(scheme: Scheme, weight: Float[Array, "D M"]) -> Codes:
    """Codes [G, g, M]."""
    columns, axes = grouped(weight, 0, scheme.group), None if scheme.per_tensor else (1,)
    if scheme.mse:
        return symmetric_mse(columns, scheme.weights, axes)
    return symmetric(columns, scheme.weights, axes, scales=scheme.scales, whole=jnp.abs(weight).max())


def round_table(scheme: Scheme, table: Float[Array, "V D"]) -> Codes:
    """An embedding's table, one scale for all of it."""
    return (symmetric_mse if scheme.mse else symmetric)(table, scheme.weights, None)


def turned(x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """x times an orthogonal matrix: random signs, then Hadamard blocks of the largest power of two that divides D, up
    to 512 (QuaRot, arXiv 2404.00456).

    (x S H) (H S W) = x W: H is symmetric and its own inverse.
    """
    size = x.shape[1]
    signs = np.random.default_rng(ROTATION_SEED).choice(np.array([-1, 1], np.float32), size)
    return rotate_blocks(x * signs, min(size & -size, ROTATION_BLOCK))


def smoothing_factors(channels: Float[Array, " D"], weight: Float[Array, "D M"]) -> Float[Array, " D"]:
    """SmoothQuant (arXiv 2211.10438, eq. 4): what a layer's input is divided by and its weight multiplied by, per
    channel.
    """
    largest = jnp.abs(weight).max(axis=1)
    factors = channels**SMOOTHING / jnp.where(largest > 0, largest, 1.0) ** (1 - SMOOTHING)
    return jnp.where((channels > 0) & (largest > 0), factors, 1.0)


def output_error(difference: Float[Array, "D M"], products: Float[Array, "D D"]) -> Float[Array, ""]:
    """The squared error of a layer's outputs, summed: tr(d^T (x^T x) d) for weights that are off by d."""
    return (difference * jnp.matmul(products, difference, precision=lax.Precision.HIGHEST)).sum()


def awq_factors(scheme: Scheme, weight: Float[Array, "D M"], products: Float[Array, "D D"]) -> Float[Array, " D"]:
    """AWQ (arXiv 2306.00978, eq. 5): 1 / s of the powers s = |x|^a, a = 0 .. 1, whose rounded weights cost least at the
    layer's output; a channel's size is the root of its mean square.

    What the input is divided by is s: the weight is multiplied with it, so that channels with large inputs are rounded
    finer.
    """
    size = jnp.sqrt(jnp.diagonal(products))
    size = jnp.maximum(jnp.where(size.max() > 0, size / size.max(), 1.0), 1e-4)

    def factors_of(power):
        found = size**power
        return found / jnp.sqrt(found.max() * found.min())

    def error_of(power):
        factors = factors_of(power)[:, None]
        values = _nearest(scheme, weight * factors).values().reshape(-1, weight.shape[1])[: len(weight)]
        return output_error(values / factors - weight, products)

    powers = jnp.linspace(0.0, 1.0, AWQ_POWERS)
    return factors_of(powers[jnp.argmin(lax.map(error_of, powers))])


def gptq(scheme: Scheme, weight: Float[Array, "D M"], nearest: Codes, products: Float[Array, "D D"]) -> Codes:
    """GPTQ (arXiv 2210.17323, algorithm 1): terms of the contraction are rounded one after the other, and those that
    follow make up for the error at the layer's output. Scales are those of the nearest codes.

    With H = x^T x, damped, and H^-1 = U^T U: w_j -= U_ij (w_i - q_i) / U_ii for j > i.
    """
    groups, group, columns = nearest.codes.shape
    size, form = len(weight), scheme.weights
    scales = jnp.broadcast_to(nearest.scale, (groups, group, columns)).reshape(-1, columns)[:size]
    padding = -size % GPTQ_BLOCK
    upper = jnp.pad(_inverse_root(products), [(0, padding)] * 2)
    upper = upper + jnp.diag((jnp.arange(size + padding) >= size).astype(upper.dtype))
    weight, scales = (jnp.pad(x, [(0, padding), (0, 0)], constant_values=one) for x, one in ((weight, 0), (scales, 1)))

    def term(block, i):
        rest, scales, within = block
        codes = form.rounded(rest[i] / scales[i])
        error = (rest[i] - codes.astype(jnp.float32) * scales[i]) / within[i, i]
        behind = jnp.where(jnp.arange(GPTQ_BLOCK) > i, within[i], 0.0)
        return (rest - behind[:, None] * error, scales, within), (codes, error)

    def block(weight, start):
        rows = lambda x: lax.dynamic_slice_in_dim(x, start, GPTQ_BLOCK)
        within = lax.dynamic_slice_in_dim(rows(upper), start, GPTQ_BLOCK, axis=1)
        _, (codes, errors) = lax.scan(term, (rows(weight), rows(scales), within), jnp.arange(GPTQ_BLOCK))
        # Rows of this block change too, and are not read again.
        return weight - jnp.matmul(rows(upper).T, errors, precision=lax.Precision.HIGHEST), codes

    _, codes = lax.scan(block, weight, jnp.arange(0, size + padding, GPTQ_BLOCK))
    return Codes(grouped(codes.reshape(-1, columns)[:size], 0, scheme.group), nearest.scale)


def _inverse_root(products: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """U, upper triangular, of (H + damping)^-1 = U^T U; a channel that is always 0 costs nothing."""
    diagonal = jnp.diagonal(products)
    dead = jnp.where(diagonal == 0, jnp.where(diagonal.mean() > 0, diagonal.mean(), 1.0), 0.0)
    damped = products + jnp.diag(dead + GPTQ_DAMPING * diagonal.mean())
    lower = jnp.linalg.cholesky(damped)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(damped), dtype=damped.dtype))
    return jnp.linalg.cholesky(inverse).T
