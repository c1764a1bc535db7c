"""null_attention and depth_route with a sharding, on eight virtual devices, against one device: see
test_sharded_operators.py.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import OperatorSharding, depth_route, merge_partials, null_attention, unzigzag, zigzag

BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 2, 48, 6, 2, 5
MORE = ("null_key", "null_value", "bias")
# mesh sizes of (data, tensor, sequence), layout, arguments
CASES = {
    "causal zigzag": ((1, 1, 8), "zigzag", dict(logit_softcap=3.0)),
    "causal zigzag grouped segments": ((2, 2, 2), "zigzag", dict(segments=True, null="prefix")),
    "causal contiguous": ((2, 1, 4), "contiguous", dict(scale=0.7)),
    "both directions": ((1, 2, 4), "contiguous", dict(is_causal=False, segments=True)),
    "both directions zigzag": ((1, 1, 3), "zigzag", dict(is_causal=False)),
    "window over several devices": ((1, 1, 8), "contiguous", dict(window=15)),
    "window with segments": ((2, 1, 3), "contiguous", dict(window=9, segments=True)),
    "window over everything": ((1, 1, 4), "contiguous", dict(window=100, is_causal=False)),
    "no null": ((1, 1, 4), "zigzag", dict(segments="alone", null=-np.inf)),
    "fewer key heads than devices": ((1, 6, 1), "contiguous", dict(null="prefix")),
    "masks": ((2, 2, 1), "contiguous", dict(null="prefix", masks=True)),
}


def mesh_of(sizes):
    names = ("data", "tensor", "sequence")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: int(np.prod(sizes))])


def make(segments=None, null=None, masks=False, **options):
    """Query, key, value, null logit and, with null="prefix", null keys and values and a bias where there are masks."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape)
    q, k, v = (
        normal(BATCH, LENGTH, HEADS, SIZE),
        normal(BATCH, LENGTH, KEY_HEADS, SIZE),
        normal(BATCH, LENGTH, KEY_HEADS, SIZE),
    )
    prefix = null == "prefix"
    b = normal(BATCH, LENGTH, HEADS) if prefix else normal(HEADS) if null is None else np.full(HEADS, null)
    more = (normal(3, KEY_HEADS, SIZE), normal(3, KEY_HEADS, SIZE)) if prefix else ()
    ids = np.sort(random.integers(0, 3, (BATCH, LENGTH)), axis=1)
    if segments == "alone":  # the first rows see no key at all
        ids = ids, np.where(np.arange(LENGTH) < 7, 9, ids)
    cotangents = normal(BATCH, LENGTH, HEADS, SIZE), normal(BATCH, HEADS, LENGTH), normal(BATCH, HEADS, LENGTH)
    if masks:
        more += (normal(1, HEADS, 1, LENGTH),)
        options |= dict(mask=random.random((BATCH, 1, LENGTH, LENGTH)) < 0.7, kv_lengths=np.array([LENGTH, 29]))
    return (q, k, v, b, *more), ids if segments else None, options, cotangents


def everything(function, arrays, cotangents):
    def loss(arrays):
        results = function(*arrays)
        finite = results._replace(lse=jnp.where(jnp.isneginf(results.lse), 0.0, results.lse))
        return sum(jnp.vdot(c, r) for c, r in zip(cotangents, finite)), finite

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return *results, *gradients


def orders(shards):
    return lambda x: zigzag(x, shards), lambda x, axis=1: unzigzag(x, shards, axis)


def compare(actual, wanted, what):
    for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        np.testing.assert_allclose(a, w, rtol=0, atol=1e-12 * max(np.abs(w).max(), 1.0), err_msg=f"{what}, result {i}")


def attention(implementation):
    for name, (sizes, layout, arguments) in CASES.items():
        arrays, ids, options, cotangents = make(**arguments)
        shards = sizes[2]
        sharding = OperatorSharding(mesh_of(sizes), "data", "tensor", "sequence", layout)
        order, back = orders(shards) if layout == "zigzag" else (lambda x: x, lambda x, axis=1: x)

        def one(q, k, v, b, *more, ids=ids, options=options):
            options = options | dict(zip(MORE, more))
            return null_attention(q, k, v, null_logit=b, segment_ids=ids, implementation="reference", **options)

        def many(q, k, v, b, *more, ids=ids, options=options, sharding=sharding, order=order, back=back):
            ids = None if ids is None else jax.tree.map(lambda x: order(jnp.asarray(x)), ids)
            q, k, v = (order(x) for x in (q, k, v))
            b, options = order(b) if b.ndim == 3 else b, options | dict(zip(MORE, more))
            result = null_attention(
                q, k, v, null_logit=b, segment_ids=ids, sharding=sharding, implementation=implementation, **options
            )
            return type(result)(back(result.output), back(result.null_mass, 2), back(result.lse, 2))

        compare(everything(many, arrays, cotangents), everything(one, arrays, cotangents), f"{implementation}, {name}")


def one_null_in_a_ring_of_eight():
    """A null a step would make exp(b) count eight times."""
    (q, k, v, b), *_ = make(null=2.0)
    sharding = OperatorSharding(mesh_of((1, 1, 8)), sequence="sequence")
    ring = null_attention(q, k, v, null_logit=b, is_causal=False, sharding=sharding, implementation="xla")
    parts = [
        null_attention(q, *(x[:, i : i + 6] for x in (k, v)), null_logit=b, is_causal=False)
        for i in range(0, LENGTH, 6)
    ]
    wrong = merge_partials([part.output for part in parts], [part.lse for part in parts], null_logit=-np.inf)
    right = null_attention(q, k, v, null_logit=b, is_causal=False, implementation="reference")
    compare(ring, right, "ring")
    assert np.abs(wrong.output - right.output).max() > 0.1 * np.abs(right.output).max()


def causal_work_is_balanced():
    """Every step of every device after its own computes the same number of scores: half of the part's square."""
    from pallas_kernels.null_attention import ring

    sharding = OperatorSharding(mesh_of((1, 1, 8)), sequence="sequence", layout="zigzag")
    options = type("Options", (), {"causal": True})

    def count(x):
        def area(rows, columns, total):
            return total + x[:, rows].shape[1] * x[:, columns].shape[1]

        one = lambda origin: ring._visible(sharding, options, x.shape[1], origin, area, jnp.zeros((), jnp.int32))
        return jnp.stack([one(origin) for origin in range(8)])[None]

    spec = PartitionSpec(None, "sequence")
    areas = np.array(sharding.mapped(count, spec, PartitionSpec("sequence"))(jnp.zeros((1, LENGTH))))
    assert areas.shape == (8, 8) and np.all(areas == (LENGTH // 8) ** 2 // 2)


def routing(implementation):
    random = np.random.default_rng(1)
    normal = lambda *shape: random.normal(size=shape)
    sharding = OperatorSharding(mesh_of((2, 2, 2)), batch="data", sequence=("sequence", "tensor"))
    sources, gain, bias, psi = [normal(2, 8, 10) for _ in range(5)], normal(10), normal(5), abs(normal(5, 2, 8))
    cotangents = normal(2, 8, 10), normal(2, 8, 5), normal(2, 8)

    def loss(arrays, sharding, stacked, implementation):
        sources, query, gain, bias, psi, beta, b = arrays
        sources = jnp.stack(sources) if stacked else sources
        results = depth_route(
            sources,
            query,
            key_norm_scale=gain,
            bias=bias,
            null_evidence=psi,
            coupling=beta,
            null_logit=b,
            num_sources=jnp.asarray(4),
            sharding=sharding,
            implementation=implementation,
        )
        return sum(jnp.vdot(c, r) for c, r in zip(cotangents, results)), results

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2, 3))
    for query in (normal(10), normal(2, 8, 10)):
        for stacked in (False, True):
            arrays = sources, query, gain, bias, psi, 0.7, 0.3
            wanted = jax.tree.leaves(run(arrays, None, stacked, "reference"))
            compare(
                jax.tree.leaves(run(arrays, sharding, stacked, implementation)), wanted, f"depth_route {implementation}"
            )


def inside_the_callers_shard_map():
    """Gradients of what devices share (null logit, static query) are summed over them, checks of variance included."""
    mesh = mesh_of((2, 1, 4))
    (q, k, v, b), _, _, cotangents = make()
    q, k, v, along = (np.repeat(x, 4, axis=1) for x in (q, k, v, cotangents[0]))  # 192 queries: tiles in loops
    cotangents = along, *(np.repeat(x, 4, axis=2) for x in cotangents[1:])
    rows = PartitionSpec("data")

    def attend(q, k, v, b, c):
        return jax.lax.psum(
            sum(jnp.vdot(x, y) for x, y in zip(c, null_attention(q, k, v, null_logit=b, implementation="xla"))), "data"
        )

    def attend_masked(q, k, v, null_key, bias, c):
        result = null_attention(q, k, v, null_key=null_key, null_value=null_key, bias=bias, implementation="xla")
        return jax.lax.psum(sum(jnp.vdot(x, y) for x, y in zip(c, result)), "data")

    def route(sources, query, gain, c):
        return jax.lax.psum(
            jnp.vdot(c, depth_route(sources, query, key_norm_scale=gain, implementation="xla").output), "data"
        )

    for function, arrays, specs in (
        (attend, (q, k, v, b, cotangents), (rows, rows, rows, PartitionSpec(), rows)),
        (
            attend_masked,
            (q, k, v, k[0, :2], q[:1, :, 0, :1, None].swapaxes(1, 3), cotangents),
            (rows, rows, rows, PartitionSpec(), PartitionSpec(), rows),
        ),
        (
            route,
            ((q[:, :, 0], q[:, :, 1]), b[:SIZE], b[1 : SIZE + 1], cotangents[0][:, :, 0]),
            (rows, PartitionSpec(), PartitionSpec(), rows),
        ),
    ):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        alone = jax.shard_map(function, mesh=mesh_of((1, 1, 1)), in_specs=specs, out_specs=PartitionSpec())
        gradients = [
            jax.tree.leaves(jax.jit(jax.grad(f, tuple(range(len(arrays) - 1))))(*arrays)) for f in (mapped, alone)
        ]
        compare(*gradients, "inside shard_map")


def main():
    assert jax.device_count() == 8
    parts = {
        "attention": lambda: (
            attention("xla"),
            attention("reference"),
            one_null_in_a_ring_of_eight(),
            causal_work_is_balanced(),
        ),
        "routing": lambda: routing("xla"),
        "shard_map": inside_the_callers_shard_map,
    }
    with jax.enable_x64(True):
        parts[sys.argv[1]]()
    print("equal")


if __name__ == "__main__":
    main()
