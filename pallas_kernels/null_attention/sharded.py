"""null_attention over a mesh: the kernels of any backend, one call a device, inside `jax.shard_map`.

Split batch and heads need no communication. Over a sequence axis keys come from the other devices: see ring.py.
"""

from collections.abc import Callable

from pallas_kernels.null_attention.base import NullAttention, Options
from pallas_kernels.null_attention.ring import ring_backward, ring_forward, window_backward, window_forward
from pallas_kernels.sharding import OperatorSharding, unzigzag, zigzag

HEADS = ("batch", "sequence", "heads", None)
ROWS = ("batch", "heads", "sequence")


def check_sharding(query, key, options: Options) -> None:
    """Raises ValueError where arguments cannot be split as `options.sharding` says."""
    sharding = options.sharding
    if not isinstance(sharding, OperatorSharding):
        raise ValueError(f"sharding: must be None or a pallas_kernels.OperatorSharding, got {type(sharding).__name__}")
    if sharding.sequence and not isinstance(sharding.sequence, str):
        raise ValueError(f"sharding: attention passes keys around one mesh axis, got sequence={sharding.sequence!r}")
    sharding.check("query", query.shape, *HEADS)
    sharding.check("key", key.shape, "batch", "sequence")
    key_heads, ways = key.shape[2], sharding.ways("heads")
    if key_heads % ways and ways % key_heads:
        raise ValueError(
            f"key: sharding splits heads {ways} ways: the number of key heads must divide it or be a multiple, got "
            f"shape {key.shape}"
        )
    if not sharding.sequence:
        return
    if options.window is not None and sharding.layout == "zigzag":
        raise ValueError(
            "window: needs layout='contiguous' over a sequence axis, where it is balanced already; got layout='zigzag'"
        )
    if (options.causal or options.window is not None) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key: over a sequence axis causal attention needs as many keys as queries ({query.shape[1]}), got "
            f"shape {key.shape}"
        )


def sharded_forward(forward: Callable) -> Callable:
    """`forward`, as `differentiable` takes it, over the mesh of `options.sharding`; itself where there is none."""

    def run(options, query, key, value, null_logit, segments):
        sharding = options.sharding
        if sharding is None:
            return forward(options, query, key, value, null_logit, segments)
        local = options._replace(sharding=None)
        step = forward if not sharding.sequence else ring_forward(forward, sharding)
        if sharding.sequence and options.window is not None:
            step = window_forward(forward, sharding)
        spec = sharding.spec
        ids = None if segments is None else (spec("batch", "sequence"),) * 2
        return sharding.mapped(
            lambda *arrays: step(local, *arrays),
            (spec(*HEADS), spec(*HEADS), spec(*HEADS), spec("heads"), ids),
            (NullAttention(spec(*HEADS), spec(*ROWS), spec(*ROWS)), spec(*ROWS)),
        )(query, key, value, null_logit, segments)

    return run


def sharded_backward(backward: Callable) -> Callable:
    """`backward`, as `differentiable` takes it, over the mesh of `options.sharding`; itself where there is none."""

    def run(options, query, key, value, segments, lse, delta, d_output):
        sharding = options.sharding
        if sharding is None:
            return backward(options, query, key, value, segments, lse, delta, d_output)
        local = options._replace(sharding=None)
        step = backward if not sharding.sequence else ring_backward(backward, sharding)
        if sharding.sequence and options.window is not None:
            step = window_backward(backward, sharding)
        spec = sharding.spec
        ids = None if segments is None else (spec("batch", "sequence"),) * 2
        return sharding.mapped(
            lambda *arrays: step(local, *arrays),
            (spec(*HEADS), spec(*HEADS), spec(*HEADS), ids, spec(*ROWS), spec(*ROWS), spec(*HEADS)),
            (spec(*HEADS),) * 3,
        )(query, key, value, segments, lse, delta, d_output)

    return run


def in_sequence_order(serve: Callable) -> Callable:
    """A backend of plain JAX operations, whose partitioning is XLA's, with the layout of `options.sharding` undone
    before and redone after it.
    """

    def run(query, key, value, null_logit, segments, options):
        sharding = options.sharding
        options = options._replace(sharding=None)
        if sharding is None or sharding.layout == "contiguous":
            return serve(query, key, value, null_logit, segments, options)
        shards = sharding.ways("sequence")
        query, key, value = (unzigzag(x, shards) for x in (query, key, value))
        segments = None if segments is None else tuple(unzigzag(x, shards) for x in segments)
        output, *rows = serve(query, key, value, null_logit, segments, options)
        return NullAttention(zigzag(output, shards), *(zigzag(x, shards, axis=2) for x in rows))

    return run
