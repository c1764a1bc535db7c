"""Attention with a null on TPUs: three Pallas kernels, forward, query gradients, and key and value gradients.

Scores are kept transposed, keys down the sublanes and queries along the lanes. What a row of attention carries (its
maximum, its sum, lse, delta, the null) is then a vector along the lanes, as statistics lie in memory; a reduction over
keys is a reduction over sublanes, which needs no shuffles between lanes; and a product of a score tile with a tile of
values or keys is a plain one. The forward kernel and that of the query gradients write their results transposed, and
read values or keys transposed; XLA turns them around outside.

The last axis of a grid runs over the tiles of the other side that a tile can reach. Its length is that of the longest
such run, and a tile with a shorter one names the same tile again, which is not copied again, and skips the arithmetic:
causal and windowed attention neither compute nor read what is masked. Only tiles that the mask cuts apply it. Decoding
(few queries) folds the query heads of a group into one tile, so that they share one reading of the keys.

Everything is deterministic. Statistics and accumulators are float32; probabilities enter the products in the type of
the inputs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Unavailable, interpreting, remark, target_device
from pallas_kernels.null_attention.base import AttentionInputs, Masks, NullAttention, Options, check_kernel
from pallas_kernels.null_attention.mosaic_tpu.kernels import forward_kernel, key_kernel, query_kernel
from pallas_kernels.null_attention.mosaic_tpu.layout import (
    from_rows,
    pad,
    padded_size,
    segment_inputs,
    statistic,
    to_keys,
    to_rows,
)
from pallas_kernels.null_attention.mosaic_tpu.tiles import (
    Blocks,
    Shape,
    by_keys,
    by_rows,
    key_range,
    longest_run,
    row_range,
)
from pallas_kernels.null_attention.unseen import without_unseen
from pallas_kernels.null_attention.vjp import differentiable

_LARGEST_HEAD = 256


def check_available(inputs: AttentionInputs) -> None:
    """Raises Unavailable where the kernels cannot serve a call, or not on the device that it is compiled for."""
    device, query = target_device(), inputs.query
    if not interpreting() and device.platform != "tpu":
        raise Unavailable(f"runs on TPUs, the call is compiled for {device.kind} ({device.platform})")
    check_kernel(inputs)
    if query.dtype == jnp.float64:
        raise Unavailable("TPUs have no float64; use float32 or bfloat16")
    if query.shape[3] > _LARGEST_HEAD:
        raise Unavailable(f"head size {query.shape[3]} is more than {_LARGEST_HEAD}, the largest whose tiles fit")


def _how() -> dict:
    """For the compiler: only the last axis of a grid has an order. The interpreter takes no such hint together with
    vmap.
    """
    if interpreting():
        return {"interpret": pltpu.InterpretParams(detect_races=True)}
    return {
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
    }


def _run(
    kernel: Callable, name: str, grid, inputs: dict, in_specs: dict, outputs: dict, out_specs: dict, scratch: dict
) -> list[jax.Array]:
    """Runs kernel(names, *refs), whose refs are the inputs, outputs and scratch buffers by these names.

    Inside a caller's `jax.shard_map` the outputs vary over the devices as the inputs do, which vjp.py has made all vary
    alike.
    """
    names = (*inputs, *outputs, *scratch)
    varying = jax.typeof(inputs["query"]).manual_axis_type
    return pl.pallas_call(
        functools.partial(kernel, names),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs.values()],
        grid=grid,
        in_specs=[in_specs[name] for name in inputs],
        out_specs=[out_specs[name] for name in outputs],
        scratch_shapes=list(scratch.values()),
        name=name,
        **_how(),
    )(*inputs.values())


def _computed(x: jax.Array) -> jax.Array:
    """float16 is computed in float32, which holds all of its numbers: TPUs have no float16 products."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _forward(options: Options, query, key, value, null_logit, masks: Masks):
    """See `vjp.differentiable`."""
    shape, key_heads, dtype = Shape.of(query, key), key.shape[2], query.dtype
    (batch, length, heads, _), size = query.shape, padded_size(query.shape[3])
    kernel_heads = key_heads if shape.folded else heads
    q, k = to_rows(_computed(query), shape, key_heads), to_keys(_computed(key), shape)
    v = to_keys(_computed(value), shape).swapaxes(2, 3)
    null = pad(jnp.repeat(null_logit[:, None], length, 1).reshape(kernel_heads, 1, -1), axis2=shape.rows)

    blocks = by_rows(options, shape, size)
    steps = longest_run(functools.partial(key_range, options, shape), shape.row_tiles)
    row = jax.ShapeDtypeStruct((batch, kernel_heads, 1, shape.rows), jnp.float32)
    output, top, total = _run(
        functools.partial(forward_kernel, options, shape),
        "null_attention_forward",
        (batch, kernel_heads, shape.row_tiles, steps),
        {"query": q, "key": k, "value": v, "null_logit": null} | segment_inputs(masks.segments, shape),
        {"query": blocks.rows(), "key": blocks.keys(), "value": blocks.keys_transposed(), "null_logit": blocks.null()}
        | blocks.segments(),
        {
            "output": jax.ShapeDtypeStruct((batch, kernel_heads, size, shape.rows), q.dtype),
            "top_out": row,
            "total_out": row,
        },
        {"output": blocks.rows_transposed(), "top_out": blocks.per_row(), "total_out": blocks.per_row()},
        {
            "top": pltpu.VMEM((1, shape.row_tile), jnp.float32),
            "total": pltpu.VMEM((1, shape.row_tile), jnp.float32),
            "weighted": pltpu.VMEM((size, shape.row_tile), jnp.float32),
        },
    )
    rows = length * heads // kernel_heads
    top, total = (x[..., :rows].reshape(batch, heads, length) for x in (top, total))
    b = null_logit[None, :, None]
    null = jnp.exp(b - top)
    empty = total + null == 0.0
    z = jnp.where(empty, 1.0, total + null)
    # log(z) without losing a small total when the null is the largest term and exp(b - top) = 1
    lse = jnp.where(empty, -jnp.inf, top + jnp.log1p(jnp.where(empty, 0.0, total + jnp.expm1(b - top))))
    return NullAttention(from_rows(output, query, shape, key_heads).astype(dtype), null / z, lse), total / z


def _backward(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
    """See `vjp.differentiable`."""
    shape, key_heads = Shape.of(query, key), key.shape[2]
    (batch, _, heads, _), size = query.shape, padded_size(query.shape[3])
    kernel_heads = key_heads if shape.folded else heads
    q, d_o = (to_rows(_computed(x), shape, key_heads) for x in (query, d_output))
    k, v = (to_keys(_computed(x), shape) for x in (key, value))
    inputs = {"query": q, "key": k, "value": v, "d_output": d_o}
    inputs |= {"lse": statistic(lse, shape, key_heads), "delta": statistic(delta, shape, key_heads)} | segment_inputs(
        masks.segments, shape
    )

    def specs(blocks: Blocks) -> dict[str, pl.BlockSpec]:
        rows, keys, per_row = blocks.rows(), blocks.keys(), blocks.per_row()
        return {
            "query": rows,
            "key": keys,
            "value": keys,
            "d_output": rows,
            "lse": per_row,
            "delta": per_row,
        } | blocks.segments()

    blocks = by_rows(options, shape, size)
    (d_query,) = _run(
        functools.partial(query_kernel, options, shape),
        "null_attention_query_gradient",
        (
            batch,
            kernel_heads,
            shape.row_tiles,
            longest_run(functools.partial(key_range, options, shape), shape.row_tiles),
        ),
        inputs | {"key_transposed": k.swapaxes(2, 3)},
        specs(blocks) | {"key_transposed": blocks.keys_transposed()},
        {"d_query": jax.ShapeDtypeStruct((batch, kernel_heads, size, shape.rows), q.dtype)},
        {"d_query": blocks.rows_transposed()},
        {"sum": pltpu.VMEM((size, shape.row_tile), jnp.float32)},
    )
    steps = longest_run(functools.partial(row_range, options, shape), shape.key_tiles)
    blocks = by_keys(options, shape, size, steps)
    gradient, total = jax.ShapeDtypeStruct(k.shape, k.dtype), pltpu.VMEM((shape.key_tile, size), jnp.float32)
    d_key, d_value = _run(
        functools.partial(key_kernel, options, shape, steps),
        "null_attention_key_gradient",
        (batch, key_heads, shape.key_tiles, shape.heads_per_key * steps),
        inputs,
        specs(blocks),
        {"d_key": gradient, "d_value": gradient},
        {"d_key": blocks.keys(), "d_value": blocks.keys()},
        {"key_sum": total, "value_sum": total},
    )
    d_key, d_value = (x[:, :, : key.shape[1], : key.shape[3]].transpose(0, 2, 1, 3) for x in (d_key, d_value))
    return tuple(x.astype(query.dtype) for x in (from_rows(d_query, query, shape, key_heads), d_key, d_value))


_serve = differentiable(_forward, _backward, kernels="mosaic_tpu")


def null_attention_mosaic_tpu(inputs: AttentionInputs) -> NullAttention:
    """The contract of `null_attention` on TPUs."""
    check_available(inputs)
    size = inputs.query.shape[3]
    if padded_size(size) > size:
        remark(f"heads of {size} are padded to {padded_size(size)}, and cost as much")
    return _serve(without_unseen(inputs))
