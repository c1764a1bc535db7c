"""Attention with a null on Hopper GPUs: our own Pallas kernels for Mosaic GPU, forward and backward.

Tiling. A program of the forward and of the query-gradient kernel owns 128 query rows of one head, 64 for each of two
computing warpgroups; a third warpgroup copies key and value tiles ahead of them. A program of the key-gradient kernel
owns 128 keys of one key head and walks over the query tiles of all its query heads. Every gradient is thus summed by
one program in a fixed order: the backward pass is deterministic, at the price of computing the scores twice. Tiles that
the causal mask or the window rules out are never copied; only those at the edge compute a mask. Copies clip at the
arrays' ends; only a length that is no multiple of 8 is padded first, to the next one, and a head size that the tiles do
not take.

Few query rows (decoding against a cache): the query heads that share a key head become the rows of one 64-row tile, so
that a key is read once for all of them, and the keys are split over as many programs as the chip has room for. The
parts are free of the null; merging adds it once.
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unavailable, interpreting, remark, target_device
from pallas_kernels.null_attention.base import AttentionInputs, Masks, NullAttention, Options, check_kernel
from pallas_kernels.null_attention.merge import merge_partials
from pallas_kernels.null_attention.unseen import without_unseen
from pallas_kernels.null_attention.vjp import differentiable

HEAD_SIZES = (64, 96, 128, 192, 256)  # those between are padded to the next
_OLDEST_JAX = (0, 11, 2)
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
_PROCESSORS = 132  # multiprocessors of an H100 or H200: how many programs run side by side


def check_available(inputs: AttentionInputs) -> None:
    """Raises Unavailable where the kernels cannot serve a call, or not on the device that it is compiled for."""
    query, key = inputs.query, inputs.key
    if jax.__version_info__ < _OLDEST_JAX:
        raise Unavailable(f"needs jax {'.'.join(map(str, _OLDEST_JAX))} or newer, this is jax {jax.__version__}")
    if not interpreting():
        device = target_device()
        if device.platform != "gpu":
            raise Unavailable(f"runs on Hopper GPUs only, the call is compiled for {device.platform}")
        if not _HOPPER.search(device.kind):
            raise Unavailable(
                f"runs on Hopper GPUs only, the call is compiled for {device.kind}, which cudnn or xla serve"
            )
        if 12080 <= _cuda_version() < 12091:
            raise Unavailable(
                "the assembler of CUDA 12.8.0 to 12.9.0 miscompiles causal masks; install 12.9.1 or newer"
            )
    check_kernel(inputs)
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unavailable(f"computes in bfloat16 and float16, the inputs are {query.dtype}")
    size = query.shape[3]
    if size % 8 or not HEAD_SIZES[0] <= size <= HEAD_SIZES[-1]:
        raise Unavailable(
            f"the head size must be one of {HEAD_SIZES}, or a multiple of 8 between, padded to the next; it is {size}"
        )
    if key.shape[1] == 0:
        raise Unavailable("there are no keys")


def _cuda_version() -> int:
    """CUDA's version as 12091 for 12.9.1; 0 where the plugin that knows, or CUDA's own library, is not installed."""
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return 0
    try:
        return 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except RuntimeError:  # before jax 0.12, where there is no GPU and one compiles ahead of time
        return 0


def _problem(options: Options, rows: int, keys: int, segments, fold: int = 1):
    from pallas_kernels.null_attention.mosaic_gpu.tiles import Problem  # here: older versions of jax cannot import it

    return Problem(options, rows, keys, fold, segments is not None, interpreting())


def _ids(segments, repeats: int = 1):
    return (
        ()
        if segments is None
        else (jnp.repeat(segments[0].astype(jnp.int32), repeats, axis=1), segments[1].astype(jnp.int32))
    )


def _forward(
    options: Options, query, key, value, null_logit, masks: Masks
) -> tuple[NullAttention, Float[Array, "B N T"]]:
    from pallas_kernels.null_attention.mosaic_gpu.forward import forward_kernel

    (batch, length, heads, _), keys, segments = query.shape, key.shape[1], masks.segments
    group = heads // key.shape[2]
    if length * group <= 64:
        return _decode(options, query, key, value, null_logit, segments)
    b = jnp.broadcast_to(null_logit.astype(jnp.float32), (batch, heads))
    problem = _problem(options, length, keys, segments)
    output, top, total = forward_kernel(problem, 1, query, key, value, b, _ids(segments))
    b = b[:, :, None]
    null = jnp.exp(b - top)
    empty = total + null == 0.0
    denominator = jnp.where(empty, 1.0, total + null)
    # log(denominator) without losing a small total where the null is the largest term and exp(b - top) = 1
    lse = top + jnp.log1p(jnp.where(empty, 0.0, total + jnp.expm1(b - top)))
    return NullAttention(output, null / denominator, jnp.where(empty, -jnp.inf, lse)), total / denominator


def split_count(batch: int, key_heads: int, keys: int) -> int:
    """Into how many parts decoding cuts the keys: as many as programs fit the chip at once, each with at least 256
    keys.
    """
    return max(1, min(_PROCESSORS // (batch * key_heads), keys // 256))


def _decode(options: Options, query, key, value, null_logit, segments):
    """Few query rows: grouped heads folded into one tile of rows, null-free parts over the keys, merged with
    the null.
    """
    from pallas_kernels.null_attention.mosaic_gpu.forward import forward_kernel

    (batch, length, heads, size), (_, keys, key_heads, _) = query.shape, key.shape
    group, splits = heads // key_heads, split_count(batch, key_heads, keys)
    rows = (
        query.reshape(batch, length, key_heads, group, size)
        .swapaxes(2, 3)
        .reshape(batch, length * group, key_heads, size)
    )
    no_null = jnp.full((batch, key_heads), -jnp.inf, jnp.float32)
    problem = _problem(options, length * group, keys, segments, group)
    output, top, total = forward_kernel(problem, splits, rows, key, value, no_null, _ids(segments, group))
    output = (
        output.reshape(batch, splits, length, group, key_heads, size)
        .swapaxes(3, 4)
        .reshape(batch, splits, length, heads, size)
    )
    lse = top + jnp.log(total)  # -inf where a part holds no key of the row
    lse = lse.reshape(batch, splits, key_heads, length, group).swapaxes(3, 4).reshape(batch, splits, heads, length)
    parts = range(splits)
    result = merge_partials([output[:, i] for i in parts], [lse[:, i] for i in parts], null_logit=null_logit)
    attended = jax.nn.logsumexp(lse, axis=1)
    return result, jnp.where(
        attended == -jnp.inf, 0.0, jnp.exp(attended - jnp.where(attended == -jnp.inf, 0.0, result.lse))
    )


def _backward(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
    from pallas_kernels.null_attention.mosaic_gpu.backward import backward_kernels

    problem = _problem(options, query.shape[1], key.shape[1], masks.segments)
    return backward_kernels(problem, query, key, value, _ids(masks.segments), lse, delta, d_output)


_serve = differentiable(_forward, _backward, kernels="mosaic_gpu")


def null_attention_mosaic_gpu(inputs: AttentionInputs) -> NullAttention:
    """The contract of `null_attention` on Hopper GPUs, in bfloat16 or float16, at head sizes from 64 to 256.

    Head sizes other than 64, 96, 128, 192 and 256 are padded with zeros to the next of these, which costs as much as it
    does.
    """
    check_available(inputs)
    inputs = without_unseen(inputs)
    size = inputs.query.shape[3]
    missing = next(whole for whole in HEAD_SIZES if whole >= size) - size
    if not missing:
        return _serve(inputs)
    remark(f"heads of {size} are padded to {size + missing}, and cost as much")
    query, key, value = (jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) for x in inputs[:3])
    result = _serve(inputs._replace(query=query, key=key, value=value))
    return result._replace(output=result.output[..., :size])
