"""The public depth_route: its contract, the check of its arguments and the table of its backends."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import as_array, described, known_number
from pallas_kernels.depth_route.base import DepthRoute, RouteInputs, Sources
from pallas_kernels.depth_route.mosaic_gpu import depth_route_mosaic_gpu
from pallas_kernels.depth_route.mosaic_tpu import depth_route_mosaic_tpu
from pallas_kernels.depth_route.reference import depth_route_reference
from pallas_kernels.depth_route.xla import depth_route_xla
from pallas_kernels.dispatch import dispatch, target_mesh
from pallas_kernels.sharding import OperatorSharding, mesh_of

# Fastest first. A backend takes RouteInputs and raises Unavailable where it cannot serve.
IMPLEMENTATIONS = {
    "mosaic_gpu": depth_route_mosaic_gpu,
    "mosaic_tpu": depth_route_mosaic_tpu,
    "xla": depth_route_xla,
    "reference": depth_route_reference,
}


def depth_route(
    sources: Sources,
    query: Float[Array, " D"] | Float[Array, "B T D"],
    *,
    key_norm_scale: Float[Array, " D"] | None = None,
    score_scale: float = 1.0,
    bias: Float[Array, " L"] | Float[Array, "B T L"] | None = None,
    null_evidence: Float[Array, "L B T"] | Sequence[Float[Array, "B T"]] | None = None,
    coupling: float | Float[Array, ""] = 0.0,
    null_logit: float | Float[Array, ""] = 0.0,
    num_sources: int | Int[Array, ""] | None = None,
    sharding: OperatorSharding | None = None,
    implementation: str | None = None,
) -> DepthRoute:
    """For every token, the weighted sum of L sources (earlier layers) and of a null source with value zero.

        g_i = score_scale * u.n(v_i) + bias_i - coupling * (psi_i - mean_j psi_j)      clamped to [-50, 50]
        alpha_i = exp(g_i) / (exp(b) + sum_j exp(g_j)),   output = sum_i alpha_i v_i

    n is the identity (OASIS, arXiv 2605.17887) or RMSNorm with gain (AttnRes, arXiv 2603.15031); the values are never
    normalized. psi is the inter-layer null evidence: the null mass of the attention that made a source (OASIS, arXiv
    2605.17887). b = 0 is Softmax1 over depth, b = -inf is softmax.

    Args:
      sources: an array [L, B, T, D], or a sequence of L arrays [B, T, D], which is never stacked.
      query: u, one for all tokens [D] or one per token [B, T, D].
      key_norm_scale: gain of the RMSNorm of the keys (epsilon 1e-6); None scores the sources themselves.
      score_scale: a number that is known when the call is traced.
      bias: added to the scores, [L] or [B, T, L].
      null_evidence: psi, [L, B, T] or a sequence of L arrays [B, T].
      coupling: beta, a scalar; only with null_evidence.
      null_logit: b, a scalar; -inf leaves the null out.
      num_sources: only the first so many sources are live: the others have weight 0 and gradient 0, whatever they hold,
        and the mean of psi is over the live ones. A Python number leaves dead sources unread; an
        array is a mask, and outside 1..L it makes every result NaN. Forward-mode autodiff needs
        implementation="reference".
      sharding: which mesh axes split batch and length; kernels then run inside `jax.shard_map`, each on its own tokens.
      implementation: a name of `pallas_kernels.implementations("depth_route")`; None takes the fastest that can serve.

    Returns:
      DepthRoute(output [B, T, D], weights [B, T, L], null_mass [B, T]); all differentiable in every float argument.

    Raises:
      ValueError: an argument does not fit, or the named implementation does not exist or cannot serve.
    """
    inputs = route_inputs(
        sources,
        query,
        key_norm_scale=key_norm_scale,
        score_scale=score_scale,
        bias=bias,
        null_evidence=null_evidence,
        coupling=coupling,
        null_logit=null_logit,
        num_sources=num_sources,
        sharding=sharding,
    )
    serve = dispatch("depth_route", IMPLEMENTATIONS, implementation)
    mesh = mesh_of(inputs.sources) if sharding is None else sharding.mesh
    with contextlib.nullcontext() if mesh is None else target_mesh(mesh):
        result = serve(inputs)
    dead = len(inputs.sources) - result.weights.shape[-1]
    return result._replace(weights=jnp.pad(result.weights, [(0, 0), (0, 0), (0, dead)])) if dead else result


def route_inputs(
    sources,
    query,
    *,
    key_norm_scale=None,
    score_scale=1.0,
    bias=None,
    null_evidence=None,
    coupling=0.0,
    null_logit=0.0,
    num_sources=None,
    sharding=None,
) -> RouteInputs:
    """The arguments of `depth_route`, checked; raises ValueError as it says."""
    sources = _check_sources(sources)
    count, shape = len(sources), sources[0].shape
    query, key_norm_scale, bias, coupling_array, null_logit = _check_shapes(
        count, shape, query=query, key_norm_scale=key_norm_scale, bias=bias, coupling=coupling, null_logit=null_logit
    )
    evidence = _check_evidence(null_evidence, coupling, (count, *shape[:2]))
    score_scale = known_number("score_scale", score_scale)
    num_sources = _check_num_sources(num_sources, count)
    wide = jnp.promote_types(sources[0].dtype, jnp.float32)
    null_logit = null_logit.astype(wide)
    if isinstance(num_sources, jax.Array):  # a number of sources that there are not makes every result NaN
        null_logit = jnp.where((num_sources >= 1) & (num_sources <= count), null_logit, jnp.nan)
        num_sources = jnp.clip(num_sources, 1, count)
    if sharding is not None:
        _check_sharding(sharding, shape)
    return RouteInputs(
        sources,
        query,
        key_norm_scale,
        bias,
        evidence,
        coupling_array.astype(wide),
        null_logit,
        num_sources,
        score_scale,
        sharding,
    )


def _check_sharding(sharding, shape: tuple[int, ...]) -> None:
    if not isinstance(sharding, OperatorSharding):
        raise ValueError(f"sharding: must be None or a pallas_kernels.OperatorSharding, got {type(sharding).__name__}")
    sharding.check("sources", shape, "batch", "sequence")


def _check_sources(sources):
    if hasattr(sources, "ndim"):
        if sources.ndim != 4 or 0 in sources.shape:
            raise ValueError(
                f"sources: an array must be [sources, batch, length, width], none of them 0, got shape {sources.shape}"
            )
        sources = as_array("sources", sources)
        each = [sources[0]]
    else:
        if not isinstance(sources, Sequence) or isinstance(sources, str):
            raise ValueError(f"sources: must be an array or a sequence of arrays, got {described(sources)}")
        sources = each = tuple(as_array("sources", source) for source in sources)
        if not each:
            raise ValueError("sources: must hold at least one array, got an empty sequence")
    for i, source in enumerate(each):
        if source.ndim != 3 or 0 in source.shape or source.shape != each[0].shape or source.dtype != each[0].dtype:
            raise ValueError(
                "sources: all must be [batch, length, width] of one shape without a 0, and of one dtype, got "
                f"{each[0].dtype} {each[0].shape} for source 0 and {source.dtype} {source.shape} for source {i}"
            )
    if not jnp.issubdtype(each[0].dtype, jnp.floating):
        raise ValueError(f"sources: must be floating-point, got {each[0].dtype}")
    return sources


def _check_shapes(count: int, shape: tuple[int, ...], **arguments) -> list[Array | None]:
    """The arguments as arrays, None where one may be and is left out."""
    batch, length, width = shape
    allowed = {
        "query": [(width,), shape],
        "key_norm_scale": [(width,)],
        "bias": [(count,), (batch, length, count)],
        "coupling": [()],
        "null_logit": [()],
    }
    arrays = []
    for name, given in arguments.items():
        if given is None and name in ("key_norm_scale", "bias"):
            arrays.append(None)
            continue
        wanted = " or ".join(str(s) for s in allowed[name])
        if given is None:
            raise ValueError(f"{name}: must have shape {wanted} for {count} sources of shape {shape}, got None")
        x = as_array(name, given)
        if x.shape not in allowed[name]:
            raise ValueError(
                f"{name}: must have shape {wanted} for {count} sources of shape {shape}, got shape {x.shape}"
            )
        whole = isinstance(given, int) and not isinstance(given, bool)
        if not jnp.issubdtype(x.dtype, jnp.floating) and not whole:
            raise ValueError(f"{name}: must be floating-point, got {x.dtype}")
        arrays.append(x)
    return arrays


def _check_evidence(null_evidence, coupling, shape: tuple[int, ...]) -> Float[Array, "L B T"] | None:
    if null_evidence is None:
        if not isinstance(coupling, int | float | np.floating) or coupling != 0:
            raise ValueError(f"coupling: needs null_evidence, got {described(coupling)} without")
        return None
    if not hasattr(null_evidence, "ndim"):
        if not isinstance(null_evidence, Sequence) or isinstance(null_evidence, str):
            raise ValueError(
                f"null_evidence: must be an array or a sequence of {shape[0]} arrays, got {described(null_evidence)}"
            )
        given = [as_array("null_evidence", psi) for psi in null_evidence]
        if [psi.shape for psi in given] != [shape[1:]] * shape[0]:
            raise ValueError(
                f"null_evidence: a sequence must hold {shape[0]} arrays of shape {shape[1:]}, got "
                f"{[psi.shape for psi in given]}"
            )
        null_evidence = jnp.stack(given)
    null_evidence = as_array("null_evidence", null_evidence)
    if null_evidence.shape != shape or not jnp.issubdtype(null_evidence.dtype, jnp.floating):
        raise ValueError(
            f"null_evidence: must be floating-point of shape {shape}, got {null_evidence.dtype} of shape "
            f"{null_evidence.shape}"
        )
    return null_evidence


def _check_num_sources(num_sources, count: int):
    """None for all, an int, or a traced scalar."""
    if num_sources is None:
        return None
    if isinstance(num_sources, int | np.integer) and not isinstance(num_sources, bool):
        if not 1 <= num_sources <= count:
            raise ValueError(f"num_sources: must lie between 1 and the number of sources {count}, got {num_sources}")
        return None if num_sources == count else int(num_sources)
    number = as_array("num_sources", num_sources)
    if number.shape != () or not jnp.issubdtype(number.dtype, jnp.integer):
        raise ValueError(f"num_sources: must be one whole number, got {described(num_sources)}")
    return number.astype(jnp.int32)
