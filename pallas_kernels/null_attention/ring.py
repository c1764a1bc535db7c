"""Context parallelism: null_attention whose sequence is split over a mesh axis, out of any backend's kernels (inside
`jax.shard_map`).

Ring (arXiv 2310.01889): keys and values travel around the axis, one device a step. Forward, a device merges its
null-free partial results and adds the null once, at the end: a null per step would count n of them. Backward, the lse
of the whole row makes every step's probabilities final, so the steps' gradients only add up; those of keys and values
travel with them and arrive home after n steps. They are summed in float32, but a kernel returns its step's part in the
dtype of the inputs.

With a causal mask a step is needed in part. In the zigzag layout device i holds the parts i and 2n-1-i of 2n: its own
step is causal over both in their order; keys of an earlier device are seen as far as their first half by all its rows;
keys of a later device are seen whole by the second half of its rows. Every step is then half of a full one, on every
device. In the contiguous layout later keys are skipped.

Window: a device fetches the keys that its first row reaches back to, at most window - 1, and makes one ordinary call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.null_attention.base import Masks, Options, wide_dtype
from pallas_kernels.null_attention.merge import merge_partials
from pallas_kernels.sharding import OperatorSharding

_ALL = slice(None)


def _send(tree, axis: str, shards: int, by: int = 1, wrap: bool = True):
    """Every device's arrays to the device `by` places further; without `wrap`, zeros arrive where nobody sends."""
    places = [(i, (i + by) % shards) for i in range(shards) if wrap or 0 <= i + by < shards]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, places), tree)


def _around(sharding: OperatorSharding, fixed, moving, carry, step: Callable):
    """Runs step(origin, fixed, moving, carry) -> (moving, carry) on what every other device sent; the own
    step is done before.

    `fixed` (keys) is sent on while a step works on it, `moving` (their gradients) after it. Returns `moving`, home
    again, and carry.
    """
    axis, shards = sharding.sequence, sharding.ways("sequence")
    if shards == 1:
        return moving, carry
    me = lax.axis_index(axis)

    def turn(state, distance):
        fixed, moving, carry = state
        following = _send(fixed, axis, shards)
        moving, carry = step((me - distance) % shards, fixed, moving, carry)
        return (following, _send(moving, axis, shards), carry), None

    state = (_send(fixed, axis, shards), _send(moving, axis, shards), carry)
    (fixed, moving, carry), _ = lax.scan(turn, state, jnp.arange(1, shards - 1)) if shards > 2 else (state, None)
    moving, carry = step((me + 1) % shards, fixed, moving, carry)
    return _send(moving, axis, shards), carry


def _visible(sharding: OperatorSharding, options: Options, length: int, origin, work: Callable, state):
    """work(rows, columns, state) -> state on the rows and the columns of `origin`'s keys that see each other, all of
    them in full.
    """
    if not options.causal:
        return work(_ALL, _ALL, state)
    first, second = slice(0, length // 2), slice(length // 2, None)
    earlier, later = ((_ALL, first), (second, _ALL)) if sharding.layout == "zigzag" else ((_ALL, _ALL), None)
    return lax.cond(
        origin < lax.axis_index(sharding.sequence),
        lambda state: work(*earlier, state),
        (lambda state: work(*later, state)) if later else lambda state: state,
        state,
    )


def _ids(masks: Masks):
    """The segment ids of the queries, and those of the keys, which travel."""
    return (None, None) if masks.segments is None else masks.segments


def _pair(rows_ids, columns_ids, columns=_ALL) -> Masks:
    return Masks() if rows_ids is None else Masks(segments=(rows_ids, columns_ids[:, columns]))


def ring_forward(forward: Callable, sharding: OperatorSharding) -> Callable:
    """A forward kernel, as `differentiable` takes it, over one device's part of a split sequence."""

    def run(options: Options, query, key, value, null_logit, masks: Masks):
        wide, length = wide_dtype(query.dtype), query.shape[1]
        no_null = jnp.full_like(null_logit, -jnp.inf)
        rows_ids, columns_ids = _ids(masks)

        def partial(options, rows, columns, fixed):
            key, value, columns_ids = fixed
            pair = _pair(None if rows_ids is None else rows_ids[:, rows], columns_ids, columns)
            result, _ = forward(options, query[:, rows], key[:, columns], value[:, columns], no_null, pair)
            return result.output.astype(wide), result.lse

        def step(origin, fixed, moving, carry):
            def work(rows, columns, carry):
                output, lse = partial(options._replace(causal=False), rows, columns, fixed)
                merged = merge_partials([carry[0][:, rows], output], [carry[1][..., rows], lse], null_logit=-jnp.inf)
                return carry[0].at[:, rows].set(merged.output), carry[1].at[..., rows].set(merged.lse)

            return moving, _visible(sharding, options, length, origin, work, carry)

        own = (key, value, columns_ids)
        _, (output, lse) = _around(sharding, own, (), partial(options, _ALL, _ALL, own), step)
        result = merge_partials([output], [lse], null_logit=null_logit)
        mass = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(lse == -jnp.inf, 0.0, result.lse)))
        return result._replace(output=result.output.astype(query.dtype)), mass

    return run


def ring_backward(backward: Callable, sharding: OperatorSharding) -> Callable:
    """A backward kernel, as `differentiable` takes it, over one device's part of a split sequence."""

    def run(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
        wide, length = wide_dtype(query.dtype), query.shape[1]
        rows_ids, columns_ids = _ids(masks)

        def gradients(options, rows, columns, fixed):
            key, value, columns_ids = fixed
            pair = _pair(None if rows_ids is None else rows_ids[:, rows], columns_ids, columns)
            parts = backward(
                options,
                query[:, rows],
                key[:, columns],
                value[:, columns],
                pair,
                lse[..., rows],
                delta[..., rows],
                d_output[:, rows],
            )
            return [x.astype(wide) for x in parts]

        def step(origin, fixed, moving, d_query):
            def work(rows, columns, sums):
                d_query, d_key, d_value = sums
                parts = gradients(options._replace(causal=False), rows, columns, fixed)
                return (
                    d_query.at[:, rows].add(parts[0]),
                    d_key.at[:, columns].add(parts[1]),
                    d_value.at[:, columns].add(parts[2]),
                )

            d_query, *moving = _visible(sharding, options, length, origin, work, (d_query, *moving))
            return tuple(moving), d_query

        own = (key, value, columns_ids)
        d_query, *moving = gradients(options, _ALL, _ALL, own)
        (d_key, d_value), d_query = _around(sharding, own, tuple(moving), d_query, step)
        return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)

    return run


def _reach(sharding: OperatorSharding, window: int, length: int) -> list[tuple[int, int]]:
    """(places back, keys) that a window needs of earlier devices, the farthest first; of that one only its
    last keys.
    """
    devices = min(sharding.ways("sequence") - 1, -(-(window - 1) // length))
    return [(back, min(length, window - 1 - (back - 1) * length)) for back in range(devices, 0, -1)]


def _with_earlier(sharding: OperatorSharding, reach: list[tuple[int, int]], x):
    """The keys that a window reaches, the own ones last; zeros where there is no earlier device."""
    axis, shards = sharding.sequence, sharding.ways("sequence")
    return jnp.concatenate(
        [*(_send(x[:, x.shape[1] - count :], axis, shards, back, wrap=False) for back, count in reach), x], axis=1
    )


def _window_masks(sharding: OperatorSharding, reach: list[tuple[int, int]], query, masks: Masks) -> Masks:
    """Segment ids that also hide the zeros which stand where there is no earlier device."""
    rows_ids, columns_ids = (jnp.zeros(query.shape[:2], jnp.int32),) * 2 if masks.segments is None else masks.segments
    columns_ids = _with_earlier(sharding, reach, columns_ids)
    me, length = lax.axis_index(sharding.sequence), query.shape[1]
    position = jnp.arange(columns_ids.shape[1]) - (columns_ids.shape[1] - length) + me * length
    nobody = (rows_ids.min() - 1).astype(columns_ids.dtype)
    return Masks(segments=(rows_ids, jnp.where(position[None] < 0, nobody, columns_ids)))


def window_forward(forward: Callable, sharding: OperatorSharding) -> Callable:
    """As `ring_forward`, for a window: keys of the devices that it reaches, and one call."""

    def run(options: Options, query, key, value, null_logit, masks: Masks):
        reach = _reach(sharding, options.window, query.shape[1])
        pair = _window_masks(sharding, reach, query, masks)
        key, value = (_with_earlier(sharding, reach, x) for x in (key, value))
        return forward(options, query, key, value, null_logit, pair)

    return run


def window_backward(backward: Callable, sharding: OperatorSharding) -> Callable:
    """As `ring_backward`, for a window: the gradients of fetched keys are sent back and added."""

    def run(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
        axis, shards, length = sharding.sequence, sharding.ways("sequence"), query.shape[1]
        reach = _reach(sharding, options.window, length)
        pair = _window_masks(sharding, reach, query, masks)
        keys, values = (_with_earlier(sharding, reach, x) for x in (key, value))
        d_query, *gradients = backward(options, query, keys, values, pair, lse, delta, d_output)

        def home(gradient, like):
            total, start = gradient[:, gradient.shape[1] - length :].astype(wide_dtype(like.dtype)), 0
            for back, count in reach:
                part = _send(gradient[:, start : start + count], axis, shards, -back, wrap=False)
                total, start = total.at[:, length - count :].add(part.astype(total.dtype)), start + count
            return total.astype(like.dtype)

        return d_query, *(home(gradient, like) for gradient, like in zip(gradients, (key, value)))

    return run
