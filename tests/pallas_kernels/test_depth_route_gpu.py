"""The depth router's Hopper kernels in Pallas' interpreter, at widths and numbers of tokens that test_depth_route.py
has not.
"""

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels.dispatch import interpret_kernels

_spec = importlib.util.spec_from_file_location(
    "test_depth_route_of_gpus", Path(__file__).with_name("test_depth_route.py")
)
suite = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(suite)


@pytest.mark.parametrize(
    "options",
    [
        dict(shape=(3, 1, 7, 96), norm=True, evidence=True),  # tokens that 4 does not divide, at a width that needs 4
        dict(shape=(4, 2, 3, 160), per_token=True, bias="token", live=(2, True)),
        dict(shape=(2, 5, 4, 576), norm=True, live=(1, True)),
        dict(shape=(3, 1, 3, 32), norm=True),  # fewer tokens than a program's
        dict(shape=(2, 1, 3, 2880), per_token=True),
        # rows that do not come out even for the two or four warps that share them
        dict(shape=(3, 1, 3, 2080), norm=True, evidence=True),
        dict(shape=(3, 2, 1, 2976), per_token=True, live=(2, True)),
        dict(shape=(2, 1, 2, 4160), norm=True, per_token=True, bias="token"),
    ],
    ids=lambda options: "x".join(map(str, options["shape"])),
)
@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax 0.11.2 or newer")
def test_the_gpu_kernels_take_widths_and_tokens_that_do_not_come_out_even(options):
    (sources, arguments), static, live, (d_output, d_weights, d_null_mass) = suite.make(**options)
    count = live[0] if live else len(sources)
    with jax.enable_x64(True):
        function = functools.partial(suite.plain, live=count, **static)
        given = suite.as_float64(((sources, arguments), (d_output, d_weights[..., :count], d_null_mass)))
        wanted = jax.tree.map(np.asarray, suite.results_and_gradients(function, *given))
    as_list = options["shape"][0] == 3
    function = functools.partial(suite.call, as_list=as_list, live=live, implementation="mosaic_gpu", **static)
    with interpret_kernels():
        (output, weights, null_mass), gradients = suite.results_and_gradients(
            function, (sources, arguments), (d_output, d_weights, d_null_mass)
        )
    assert np.all(np.asarray(weights[..., count:]) == 0)
    values = output, weights[..., :count], null_mass
    jax.tree.map(lambda a, w: suite.assert_close(a, w, 1e-6), values, wanted[0])
    jax.tree.map(lambda a, w: suite.assert_close(a, w, 1e-5), gradients, wanted[1])
