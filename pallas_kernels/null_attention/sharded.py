"""null_attention over a mesh: the kernels of any backend, one call a device, inside `jax.shard_map`.

Split batch and heads need no communication. Over a sequence axis keys come from the other devices: see ring.py.
"""

from collections.abc import Callable

from jax import lax

from pallas_kernels.dispatch import Unavailable
from pallas_kernels.null_attention.base import AttentionInputs, Masks, NullAttention, Options
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


def check_sequence(inputs: AttentionInputs) -> None:
    """Raises Unavailable for masks that do not follow the keys around a sequence axis."""
    sharding, names = inputs.options.sharding, inputs.masks.beyond_segments
    if names and sharding is not None and sharding.sequence:
        raise Unavailable(f"has no {' or '.join(names)} where sharding splits the sequence over {sharding.sequence}")


def _mask_specs(sharding: OperatorSharding, masks: Masks) -> Masks:
    """How masks are split: by batch and heads where they have these dimensions in full, by the sequence only their
    segments.
    """
    split = lambda x: sharding.spec(*(axis if size > 1 else None for axis, size in zip(("batch", "heads"), x.shape)))
    rows = sharding.spec("batch")
    return Masks(
        segments=None if masks.segments is None else (sharding.spec("batch", "sequence"),) * 2,
        mask=None if masks.mask is None else split(masks.mask),
        bias=None if masks.bias is None else split(masks.bias),
        query_offset=None if masks.query_offset is None else rows,
        kv_lengths=None if masks.kv_lengths is None else rows,
    )


def sharded_forward(forward: Callable) -> Callable:
    """`forward`, as `differentiable` takes it, over the mesh of `options.sharding`; itself where there is none."""

    def run(options, query, key, value, null_logit, masks):
        sharding = options.sharding
        if sharding is None:
            return forward(options, query, key, value, null_logit, masks)
        local = options._replace(sharding=None)
        step = forward if not sharding.sequence else ring_forward(forward, sharding)
        if sharding.sequence and options.window is not None:
            step = window_forward(forward, sharding)
        spec = sharding.spec
        return sharding.mapped(
            lambda *arrays: step(local, *arrays),
            (spec(*HEADS), spec(*HEADS), spec(*HEADS), spec("heads"), _mask_specs(sharding, masks)),
            (NullAttention(spec(*HEADS), spec(*ROWS), spec(*ROWS)), spec(*ROWS)),
        )(query, key, value, null_logit, masks)

    return run


def sharded_backward(backward: Callable) -> Callable:
    """`backward`, as `differentiable` takes it, over the mesh of `options.sharding`; itself where there is none."""

    def run(options, query, key, value, masks, lse, delta, d_output):
        sharding = options.sharding
        if sharding is None:
            return backward(options, query, key, value, masks, lse, delta, d_output)
        local = options._replace(sharding=None)
        step = backward if not sharding.sequence else ring_backward(backward, sharding)
        if sharding.sequence and options.window is not None:
            step = window_backward(backward, sharding)
        spec, mask_specs = sharding.spec, _mask_specs(sharding, masks)
        bias_spec = () if masks.bias is None else (mask_specs.bias,)

        def mapped(*arrays):
            d_query, d_key, d_value, *d_bias = step(local, *arrays)
            return d_query, d_key, d_value, *(_over_devices(sharding, masks.bias, x) for x in d_bias)

        return sharding.mapped(
            mapped,
            (spec(*HEADS), spec(*HEADS), spec(*HEADS), mask_specs, spec(*ROWS), spec(*ROWS), spec(*HEADS)),
            (spec(*HEADS),) * 3 + bias_spec,
        )(query, key, value, masks, lse, delta, d_output)

    return run


def _over_devices(sharding: OperatorSharding, bias, d_bias):
    """The gradient of a bias that devices share, summed over them."""
    shared = [axis for axis, size in zip(("batch", "heads"), bias.shape) if size == 1]
    axes = sharding.axes(*shared)
    return lax.psum(d_bias, axes) if axes else d_bias


def in_sequence_order(serve: Callable) -> Callable:
    """A backend of plain JAX operations, whose partitioning is XLA's, with the layout of `options.sharding` undone
    before and redone after it.
    """

    def run(inputs: AttentionInputs) -> NullAttention:
        check_sequence(inputs)
        sharding = inputs.options.sharding
        inputs = inputs._replace(options=inputs.options._replace(sharding=None))
        if sharding is None or sharding.layout == "contiguous":
            return serve(inputs)
        shards = sharding.ways("sequence")
        turned = {name: unzigzag(getattr(inputs, name), shards) for name in ("query", "key", "value")}
        if inputs.null_logit.ndim == 3:
            turned["null_logit"] = unzigzag(inputs.null_logit, shards, axis=2)
        if inputs.masks.segments is not None:
            turned["masks"] = Masks(segments=tuple(unzigzag(x, shards) for x in inputs.masks.segments))
        output, *rows = serve(inputs._replace(**turned))
        return NullAttention(zigzag(output, shards), *(zigzag(x, shards, axis=2) for x in rows))

    return run
