"""What a run may ask of the machine it is on."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator

import jax
from jax.sharding import Mesh

from oasis_jax.config import Config, ModelConfig
from oasis_jax.errors import UserError

_WAYS_OUT = (
    "lower data.batch_size or data.sequence_length, raise optimizer.accumulation_steps, set model.remat=layer or "
    "model.dtype=bfloat16, split over more devices with mesh.fsdp, or take a smaller model; --plan says what a device "
    "needs"
)
_STATE = 3 * 4  # bytes: a parameter and two moments in float32


def check_limits(config: Config, mesh: Mesh) -> None:
    """Before anything is allocated.

    Raises:
      UserError: a warm-up that the run would not reach the end of, or a model or batch of which even the least part is
        more than the memory of all devices.
    """
    warmup, steps = config.optimizer.warmup_steps, config.run.steps
    if warmup > steps:
        raise UserError(
            f"optimizer.warmup_steps: {warmup} is longer than the run, run.steps={steps}; give a longer run or at most "
            f"--set optimizer.warmup_steps={steps}"
        )
    memory = _memory(mesh)
    if memory is None:
        return
    model, data = config.model, config.data
    tokens = data.batch_size * data.sequence_length
    sizes = f"num_layers={model.num_layers}, width={model.width}, num_heads={model.num_heads}, mlp_dim={model.mlp_size}"
    for where, needed in {
        f"model: parameters and moments of {sizes}": _STATE * least_parameters(model),
        f"data.batch_size: {data.batch_size} examples of {data.sequence_length} tokens": 3 * 4 * tokens,
        f"data.batch_size: the activations of one layer for {tokens // config.optimizer.accumulation_steps} tokens of "
        f"width {model.width}": 2 * model.width * tokens // config.optimizer.accumulation_steps,
    }.items():
        if needed > memory:
            raise UserError(
                f"{where} take at least {needed / 2**30:.4g} GiB, all devices together have {memory / 2**30:.4g} GiB"
            )


def check_parameters(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError for a model, as a checkpoint says it, of which the parameters alone are more than all memory."""
    needed, memory = 4 * least_parameters(model), _memory(mesh)
    if memory is not None and needed > memory:
        raise UserError(
            f"its parameters take at least {needed / 2**30:.4g} GiB, all devices together have {memory / 2**30:.4g} GiB"
        )


def least_parameters(model: ModelConfig) -> int:
    """The matrices of attention and MLP, without embedding, routers and what is small."""
    attention = 2 * model.width * model.head_size * (model.num_heads + model.key_heads)
    return model.num_layers * (attention + 2 * model.width * model.mlp_size)


def refuse_links(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Before anything is written into a folder that others may have filled; it may itself be a link.

    Args:
      folder: need not exist.
      names: patterns of what will be written in it.

    Raises:
      UserError: one of them is a link there, behind which anything could be overwritten.
    """
    for path in (path for name in names for path in folder.glob(name) if path.is_symlink()):
        raise UserError(f"{str(path)!r} is a link to {os.readlink(path)!r}; nothing is written through it: remove it")


def _memory(mesh: Mesh) -> int | None:
    """Bytes of all devices together; None where nobody says."""
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", 0) * mesh.size or None
    try:  # the devices of a host share its memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    except (AttributeError, OSError, ValueError):
        return None


@contextlib.contextmanager
def out_of_memory_in_words() -> Iterator[None]:
    """Says what to lower where a device or the host has too little memory."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        raise UserError(f"out of memory: {text[:120]}; {_WAYS_OUT}") from error
