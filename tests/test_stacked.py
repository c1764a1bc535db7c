"""The two layouts of a decoder's parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from oasis_jax import Decoder, ModelConfig
from oasis_jax.decoder import parameter_axes
from oasis_jax.stacked import stack_axes, stack_layers, unstack_layers


@pytest.mark.parametrize("options", [dict(preset="residual", norm="none"), dict(preset="oasis"), dict(preset="attnres", tied_head=False)])
def test_the_layouts_are_inverse(options):
    config = ModelConfig(num_layers=3, width=12, num_heads=3, mlp_dim=20, vocab_size=13, **options)
    layers = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    stacked = stack_layers(layers)
    assert stacked["layers"]["attention"]["query"].shape == (3, *layers["layers"][0]["attention"]["query"].shape)
    for i in range(3):
        assert np.array_equal(stacked["layers"]["mlp"]["up"][i], layers["layers"][i]["mlp"]["up"])
    if "routers" in layers:
        assert stacked["routers"]["query"].shape[0] == len(layers["routers"]) == 6
    back = unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, back, layers)

    shapes = jax.eval_shape(stack_layers, layers)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, stacked)
    axes = stack_axes(parameter_axes(config))
    jax.tree.map(lambda x, names: len(names) == x.ndim or pytest.fail(f"{names}, {x.shape}"), stacked, axes)
    assert axes["layers"]["attention"]["query"] == (None, "embed", "heads", None)
