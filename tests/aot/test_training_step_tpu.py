"""Whole training steps through the TPU compiler: sharded over four chips that are not there, with our kernels
in them.
"""

import importlib.util
import pathlib

import jax
import pytest

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.placement import make_mesh
from oasis_jax.training.plan import abstract_batch
from oasis_jax.training.state import abstract_state
from oasis_jax.training.step import make_step

pytestmark = pytest.mark.aot

_spec = importlib.util.spec_from_file_location("tpu_compiler", pathlib.Path(__file__).with_name("tpu_compiler.py"))
tpu_compiler = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tpu_compiler)


@pytest.mark.parametrize(
    "preset, axes",
    [
        ("oasis", dict(fsdp=2, tensor=2)),
        ("oasis", dict(data=2, sequence=2)),
        ("oasis_blocks", dict(fsdp=4)),
        ("residual", dict(tensor=4)),
    ],
)
def test_a_sharded_step_runs_our_kernels(preset, axes):
    devices = list(tpu_compiler.tpu_mesh("v5e:2x2", all=4).devices.flat)
    blocks = dict(blocks=2) if preset == "oasis_blocks" else {}
    config = Config(
        model=ModelConfig(
            preset=preset,
            num_layers=2,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            vocab_size=512,
            dtype="bfloat16",
            **blocks,
        ),
        data=DataConfig(batch_size=4, sequence_length=1024),
        mesh=MeshConfig(**axes),
    )
    mesh = make_mesh(config.mesh, devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = (
            make_step(config, mesh)
            .lower(abstract_state(config, mesh), abstract_batch(config, mesh))
            .compile()
            .as_text()
        )
    for kernel in ("null_attention_forward", "null_attention_query_gradient", "null_attention_key_gradient"):
        assert kernel in text
    for kernel in ("depth_route_forward", "depth_route_backward"):
        assert (kernel in text) == (preset != "residual")
    # As loops: however many layers, a kernel is called where it was written. Two routers a layer, forward, again and
    # backward.
    assert text.count('custom_call_target="tpu_custom_call"') < 20
