"""What is particular to depth_route's TPU kernels, in their interpreter: many blocks, with rows beyond the end; what
they refuse.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import depth_route
from pallas_kernels.depth_route import mosaic_tpu
from pallas_kernels.dispatch import interpret_kernels

_spec = importlib.util.spec_from_file_location(
    "shared_depth_route", pathlib.Path(__file__).with_name("test_depth_route.py")
)
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

CASES = {
    "static": dict(shape=(3, 2, 35, 11), norm=True, bias="token", evidence=True),
    "per_token": dict(shape=(3, 2, 35, 11), norm=True, per_token=True, score_scale=0.7),
    "live": dict(shape=(5, 2, 19, 7), norm=True, evidence=True, live=(3, True)),
    "whole_blocks": dict(shape=(3, 3, 16, 11), bias="source"),
}


@pytest.mark.parametrize("as_list", [False, True], ids=["array", "list"])
@pytest.mark.parametrize("name", CASES)
def test_blocks_of_sixteen_rows(monkeypatch, name, as_list):
    monkeypatch.setattr(mosaic_tpu, "STACKED_BLOCK", 1)
    monkeypatch.setattr(mosaic_tpu, "TUPLE_STEP", 1)
    arrays, options, live, cotangents = shared.make(**CASES[name])
    function = functools.partial(shared.call, as_list=as_list, live=live, implementation="mosaic_tpu", **options)
    with interpret_kernels():
        values, gradients = shared.results_and_gradients(function, arrays, cotangents)
        jax.block_until_ready((values, gradients))
    assert not shared.races_found()
    count = live[0] if live else len(arrays[0])
    with jax.enable_x64(True):
        known = shared.as_float64((cotangents[0], cotangents[1][..., :count], cotangents[2]))
        plain = functools.partial(shared.plain, live=count, **options)
        wanted, wanted_gradients = shared.results_and_gradients(plain, shared.as_float64(arrays), known)
    wanted = wanted[0], np.pad(wanted[1], [(0, 0), (0, 0), (0, len(arrays[0]) - count)]), wanted[2]
    jax.tree.map(lambda a, w: shared.assert_close(a, w, 1e-6), tuple(values), wanted)
    jax.tree.map(lambda a, w: shared.assert_close(a, w, 1e-5), gradients, wanted_gradients)


def test_dead_sources_are_not_copied():
    """The index map repeats the last live source's block, or the first block of a source of its own."""
    for sources in (jnp.ones((5, 2, 35, 7)), tuple(jnp.ones((5, 2, 35, 7)))):
        with interpret_kernels():
            plan = mosaic_tpu._plan(
                mosaic_tpu.RouteOptions(True, 1.0), sources, jnp.ones(7), jnp.int32(3), backward=False
            )
        specs, *_ = mosaic_tpu._specs(plan)
        if plan.stacked:
            blocks = [tuple(map(int, specs[0].index_map(1, 0, i, np.int32([3])))) for i in range(5)]
            assert blocks == [(0, 1, 0, 0), (1, 1, 0, 0), *[(2, 1, 0, 0)] * 3]
        else:
            blocks = [tuple(map(int, spec.index_map(1, 0, np.int32([3])))) for spec in specs]
            assert blocks == [(1, 0, 0)] * 3 + [(0, 0, 0)] * 2


def test_what_it_refuses():
    arrays = jnp.ones((3, 2, 5, 7)), jnp.ones(7)
    with pytest.raises(ValueError, match="mosaic_tpu: runs on TPUs only, the call is compiled for cpu"):
        depth_route(*arrays, implementation="mosaic_tpu")
    with interpret_kernels():
        with jax.enable_x64(True), pytest.raises(ValueError, match="float32 and bfloat16, got float64"):
            depth_route(arrays[0].astype(jnp.float64), arrays[1], implementation="mosaic_tpu")
        with pytest.raises(
            ValueError,
            match=r"129 sources of width 8192 float32 need .* MiB of VMEM, .* has 64; one array of sources needs less",
        ):
            many = [jax.ShapeDtypeStruct((1, 64, 8192), jnp.float32)] * 129
            jax.eval_shape(lambda *sources: depth_route(sources, jnp.ones(8192), implementation="mosaic_tpu"), *many)
