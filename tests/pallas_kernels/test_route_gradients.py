"""add_route_gradients against float64 autodiff of the plain definition, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import OperatorSharding, add_route_gradients, depth_route
from pallas_kernels.dispatch import interpret_kernels

L, B, LIVE = 5, 2, 3
CASES = {
    "projected": dict(per_token=True, bias=True, evidence=True, scale=0.3),
    "static": dict(norm=True, evidence=True, null_logit=-np.inf),
    "clamped": dict(per_token=True, bias=True, evidence=True, scale=9.0, null_logit=49.0),
    "all_live": dict(norm=True, per_token=True, scale=1.0, live=L),
}


def make(per_token=False, norm=False, bias=False, evidence=False, scale=1.0, null_logit=0.3, live=LIVE, sizes=(3, 11)):
    """(sources, arguments, options, the gradients so far, the cotangent, number of live sources)."""
    (T, width), random = sizes, np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    arguments = {"query": normal(B, T, width) if per_token else normal(width)}
    if norm:
        arguments["key_norm_scale"] = 1 + normal(width) / 3
    if bias:
        arguments["bias"] = normal(L)
    if evidence:
        arguments |= {"null_evidence": random.uniform(size=(L, B, T)).astype(np.float32), "coupling": np.float32(1.3)}
    options = dict(score_scale=scale, null_logit=null_logit)
    return normal(L, B, T, width), arguments, options, normal(L, B, T, width), normal(B, T, width), live


def expected(case, sizes):
    """The gradients by JAX of the reference over the live sources alone."""
    with jax.enable_x64(True):
        sources, arguments, options, into, d_output, live = as_float64(make(**CASES[case], sizes=sizes))

        def output(sources, arguments):
            per_source = {name: arguments[name][:live] for name in ("bias", "null_evidence") if name in arguments}
            return depth_route(sources[:live], **(arguments | per_source), **options, implementation="reference").output

        d_sources, d_arguments = jax.vjp(output, sources, arguments)[1](d_output)
        return into + d_sources, d_arguments


def as_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if isinstance(x, np.ndarray | np.float32) else x, tree)


def ours(case, sizes, implementation, sharding=None, convert=lambda x: x):
    sources, arguments, options, into, d_output, live = convert(make(**CASES[case], sizes=sizes))

    @jax.jit
    def run(sources, arguments, into, d_output, live):
        rest = dict(options, num_sources=live, implementation=implementation, sharding=sharding)
        result = depth_route(sources, **arguments, **rest)
        return add_route_gradients(into, d_output, result, sources, **arguments, **rest)

    return run(sources, arguments, into, d_output, jnp.int32(live)), into


# The TPU interpreter adds to an array only where its blocks divide it: 16 tokens.
IMPLEMENTATIONS = [("xla", (3, 11)), ("reference", (3, 11)), ("mosaic_tpu", (8, 13))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation, sizes", IMPLEMENTATIONS)
def test_equals_autodiff(case, implementation, sizes):
    if implementation == "mosaic_tpu":
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
        with interpret_kernels():
            gradients, into = ours(
                case, sizes, implementation, OperatorSharding(mesh, batch="data") if case == "static" else None
            )
    else:
        with jax.enable_x64(True):
            gradients, into = ours(case, sizes, implementation, convert=as_float64)
    d_sources, d_arguments = expected(case, sizes)
    # a score of 50 that is off by one float32 spacing moves a weight by 50 spacings
    tolerance = 1e-12 if implementation != "mosaic_tpu" else 5e-4 if case == "clamped" else 1e-5
    for name, wanted in dict(d_arguments, sources=d_sources).items():
        np.testing.assert_allclose(
            getattr(gradients, name), wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name
        )
    live = CASES[case].get("live", LIVE)
    np.testing.assert_array_equal(gradients.sources[live:], into[live:])
    given = {"sources", *d_arguments}
    assert [name for name, x in gradients._asdict().items() if x is None] == [
        x for x in gradients._fields if x not in given
    ]


def test_what_does_not_fit_is_refused():
    sources, arguments, options, into, d_output, _ = make(**CASES["projected"])
    result = depth_route(sources, **arguments, **options)
    with pytest.raises(
        ValueError, match=r"^sources: must be one array of the shape of into, \(5, 2, 3, 11\), got a sequence$"
    ):
        add_route_gradients(into, d_output, result, list(sources), **arguments, **options)
    with pytest.raises(
        ValueError, match=r"^sources: must be one array of the shape of into, \(4, 2, 3, 11\), got \(5, 2, 3, 11\)$"
    ):
        add_route_gradients(into[1:], d_output, result, sources, **arguments, **options)
    with pytest.raises(ValueError, match="add_route_gradients has no 'xls'"):
        add_route_gradients(into, d_output, result, sources, **arguments, **options, implementation="xls")
