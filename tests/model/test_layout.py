"""The two layouts of a decoder's parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from oasis_jax import Decoder, ModelConfig
from oasis_jax.config import PRESETS
from oasis_jax.model.decoder import initial_params, parameter_axes, parameter_roles, parameter_shapes, with_parameters
from oasis_jax.model.layout import is_stacked, part, stack_layers, unstack_layers


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(preset="residual", norm="none"), marks=pytest.mark.slow),
        dict(preset="oasis"),
        pytest.param(dict(preset="attnres", tied_head=False), marks=pytest.mark.slow),
        dict(preset="residual", norm="layernorm", qkv_bias=True, mlp_gated=False, mlp_bias=True, learned_positions=5),
    ],
)
def test_the_layouts_are_inverse_and_start_alike(options):
    config = ModelConfig(num_layers=3, width=12, num_heads=3, mlp_dim=20, vocab_size=13, **options)
    key = jax.random.key(5)
    layers = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)))))()
    stacked = stack_layers(layers)
    assert is_stacked(stacked) and not is_stacked(layers)
    assert stacked["layers"]["attention"]["query"].shape == (3, *layers["layers"][0]["attention"]["query"].shape)
    for i in range(3):
        assert np.array_equal(stacked["layers"]["mlp"]["up"][i], layers["layers"][i]["mlp"]["up"])
        jax.tree.map(np.testing.assert_array_equal, part(stacked["layers"], i), part(layers["layers"], i))
    if "routers" in layers:
        assert stacked["routers"]["query"].shape[0] == len(layers["routers"]) == 6
    back = unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, back, layers)

    assert jax.tree.map(lambda x: x.shape, parameter_shapes(config)) == jax.tree.map(lambda x: x.shape, stacked)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: initial_params(config, key))(), stacked)

    decoder = with_parameters(config, back)
    jax.tree.map(np.testing.assert_array_equal, decoder.parameters(), layers)


@pytest.mark.parametrize(
    "options",
    [
        *(dict(preset=preset) for preset in PRESETS),
        dict(preset="learned_sink", tied_head=False, gate="per_head", norm="gatednorm", qk_norm=True),
        dict(preset="residual", norm="layernorm", qkv_bias=True, output_bias=True, mlp_bias=True, learned_positions=7),
        dict(preset="residual", norm="dyt", inputs="vectors", vector_dim=5, mlp_gated=False),
        dict(preset="residual", norm="none"),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_parameter_has_axes_and_a_role_and_the_axis_of_layers_is_never_split(options):
    config = ModelConfig(**dict(num_layers=4, vocab_size=13) | options)
    shapes = parameter_shapes(config)
    is_axes = lambda x: isinstance(x, tuple)
    ranks = jax.tree.map(len, parameter_axes(config), is_leaf=is_axes)
    assert ranks == jax.tree.map(lambda x: len(x.shape), shapes)
    for name in {"layers", "routers"} & set(shapes):
        assert {axes[0] for axes in jax.tree.leaves(parameter_axes(config)[name], is_leaf=is_axes)} == {None}
    assert jax.tree.structure(parameter_roles(config)) == jax.tree.structure(shapes)

    # A module's parameters say the same of themselves.
    modules = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    for name, axes in parameter_axes(config).items():
        stacked = name in ("layers", "routers")
        one = dict(nnx.to_flat_state(modules[name][0] if stacked else modules[name]))
        said = {path: (None, *x.axes) if stacked else x.axes for path, x in one.items()}
        assert said == _flat(axes, is_axes)
        assert {path: x.role for path, x in one.items()} == _flat(parameter_roles(config)[name], None)


def _flat(tree, is_leaf):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {tuple(key.key for key in path): x for path, x in leaves}


def test_methods_start_alike_wherever_their_parameters_agree():
    """What one method has and another has not moves no other parameter: comparisons start from equal weights."""

    def start(**options):
        config = ModelConfig(num_layers=4, width=12, num_heads=3, mlp_dim=20, vocab_size=13, **options)
        params = initial_params(config, jax.random.key(5))
        return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}

    twin = start(preset="residual")
    others = [dict(preset=preset) for preset in PRESETS] + [
        dict(preset="gated", norm="gatednorm"),
        dict(preset="oasis", norm="none", qk_norm=True, qkv_bias=True),
    ]
    for options in others:
        found = start(**options)
        shared = [name for name in twin if name in found and found[name].shape == twin[name].shape]
        assert {"['embedding']['table']", "['layers']['attention']['query']", "['layers']['mlp']['down']"} <= {*shared}
        for name in shared:
            np.testing.assert_array_equal(found[name], twin[name], err_msg=f"{options} {name}")
