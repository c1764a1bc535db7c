"""The two layouts of a decoder's parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from oasis_jax import Decoder, ModelConfig
from oasis_jax.config import PRESETS
from oasis_jax.model.decoder import parameter_axes
from oasis_jax.model.layout import initial_params, stack_layers, stacked_axes, unstack_layers


@pytest.mark.parametrize(
    "options", [dict(preset="residual", norm="none"), dict(preset="oasis"), dict(preset="attnres", tied_head=False)]
)
def test_the_layouts_are_inverse_and_start_alike(options):
    config = ModelConfig(num_layers=3, width=12, num_heads=3, mlp_dim=20, vocab_size=13, **options)
    key = jax.random.key(5)
    layers = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)))))()
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
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: initial_params(config, key))(), stacked)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_axis_of_layers_is_never_split(preset):
    config = ModelConfig(preset=preset, num_layers=4, vocab_size=13)
    axes, layers = stacked_axes(config), parameter_axes(config)
    for name in {"layers", "routers"} & set(layers):
        for one in layers[name].values():
            assert jax.tree.map(lambda x: (None, *x), one, is_leaf=lambda x: isinstance(x, tuple)) == axes[name]
    assert {name: axes[name] for name in ("ends", "final_norm")} == {
        name: layers[name] for name in ("ends", "final_norm")
    }
