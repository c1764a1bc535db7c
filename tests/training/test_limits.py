"""What no machine can do is refused before anything is read or allocated; what it runs out of is said in words."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.overrides import apply_overrides
from oasis_jax.placement import make_mesh
from oasis_jax.training.limits import check_limits, least_parameters, out_of_memory_in_words, refuse_links
from oasis_jax.training.loop import fit

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["model.width=2147483640"],
            "^model: parameters and moments of num_layers=4, width=2147483640, .* all devices",
        ),
        (["model.num_layers=4096", "model.width=65536"], "^model: parameters and moments"),
        (["model.num_heads=2147483646", "model.head_dim=64"], "^model: parameters and moments"),
        (
            ["data.batch_size=2147483647"],
            r"^data.batch_size: 2147483647 examples of 256 tokens take at least .* GiB, all",
        ),
        (["data.sequence_length=2147483647", "model.width=4096"], "^data.batch_size: 16 examples of 2147483647 tokens"),
        (
            ["optimizer.warmup_steps=301"],
            "^optimizer.warmup_steps: 301 is longer than the run, run.steps=300; .* --set",
        ),
    ],
)
def test_what_no_machine_can_do(words, message, tmp_path):
    """The same in Python and from the command line; the workdir is not even made."""
    with pytest.raises(UserError, match=message) as error:
        fit(apply_overrides(Config(), words), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_warm_up_as_long_as_the_run_is_a_recipe():
    check_limits(Config(optimizer=OptimizerConfig(warmup_steps=7), run=RunConfig(steps=7)), MESH)


@pytest.mark.parametrize("preset", ["residual", "oasis_blocks", "null_key_value"])
def test_no_model_has_fewer_parameters(preset):
    model = ModelConfig(preset=preset, num_layers=4, width=36, num_heads=6, num_kv_heads=3, mlp_dim=52, vocab_size=8)
    count = sum(x.size for x in jax.tree.leaves(parameter_shapes(model)))
    assert 0.3 * count < least_parameters(model) < count


def test_what_fits_is_not_refused():
    """A model and a batch that a small machine trains."""
    data = DataConfig(batch_size=64, sequence_length=1024)
    check_limits(
        dataclasses.replace(Config(data=data), model=ModelConfig(num_layers=12, width=768, num_heads=12)), MESH
    )


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        "checkpoints/5",
        "metrics.jsonl",
        "metrics.partial",
        "training.lock",
        "tensorboard",
        "wandb",
        "wandb_run_id",
        "profile",
    ],
)
def test_nothing_is_written_through_a_link(name, tmp_path):
    precious, workdir = tmp_path / "precious", tmp_path / "run"
    precious.mkdir()
    (workdir / name).parent.mkdir(parents=True)
    (workdir / name).symlink_to(precious, target_is_directory=True)
    with pytest.raises(UserError, match=f"{name}' is a link to .*precious'; nothing is written through it: remove it$"):
        fit(Config(), workdir)
    assert not any(precious.iterdir()) and [path.name for path in workdir.iterdir()] == [name.split("/")[0]]
    (tmp_path / "another").symlink_to(precious, target_is_directory=True)
    refuse_links(tmp_path / "another", ["*"])


def test_a_device_that_runs_out_says_what_to_lower():
    words = r"^out of memory: RESOURCE_EXHAUSTED.*; lower data.batch_size .*mesh.fsdp"
    with pytest.raises(UserError, match=words), out_of_memory_in_words():
        jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 21, 1 << 21)))())
    with pytest.raises(UserError, match=r"^out of memory: no room; lower"), out_of_memory_in_words():
        raise MemoryError("no room")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory_in_words():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
