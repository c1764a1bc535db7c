"""Whether a run will fit: its training step compiled ahead of time for hardware that is not there, and what the
compiler says of it.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from oasis_jax.config import Config
from oasis_jax.data import TOKENIZERS
from oasis_jax.errors import UserError, nearest
from oasis_jax.model.scanned import follows_remat, uses_scan
from oasis_jax.training.collectives import Collective, collectives
from oasis_jax.training.flops import peak_flops, training_flops
from oasis_jax.training.gpu_targets import gpu_descriptions, memory_bytes
from oasis_jax.training.sharding import batch_sharding, make_mesh
from oasis_jax.training.state import abstract_state
from oasis_jax.training.step import make_step

# GiB of memory a device has for programs, by what precedes the colon of --plan; TPUs are named as their compiler names
# them.
TPU_MEMORY = {"v4": 32.0, "v5e": 16.0, "v5p": 95.0, "v6e": 32.0, "tpu7x": 96.0}
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200 141GB HBM3e", "b200": "NVIDIA B200"}
GPU_FRACTION = (
    0.92  # JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more; CUDA and NCCL need the rest
)
_GIB = 2.0**30


class Target(NamedTuple):
    """Devices to compile for, and what each of them can hold."""

    name: str
    devices: Sequence[jax.Device]
    memory_gib: float


class Plan(NamedTuple):
    """What a compiled training step needs, per device, in bytes."""

    target: Target
    mesh: Mesh
    parameters: int
    optimizer: int
    batch: int
    temporary: int
    collectives: list[Collective] | None  # None: the compiler refused to make a program of this size
    flops_per_token: float
    tokens_per_step: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.temporary

    @property
    def step_flops(self) -> float:
        """Of one device."""
        return self.flops_per_token * self.tokens_per_step / self.mesh.size

    @property
    def fits(self) -> bool:
        return self.collectives is not None and self.total <= self.target.memory_gib * _GIB


def target(text: str) -> Target:
    """The devices that --plan names: "v5p:4x4x4", "v5e:2x2", "h100:8".

    Raises:
      UserError: no such hardware, or its compiler is not installed.
    """
    name, _, shape = text.partition(":")
    known = (*TPU_MEMORY, *GPUS)
    if name not in known or not re.fullmatch(r"\d+(x\d+)*", shape):
        hint = "" if name in known else nearest(name, known)
        raise UserError(
            f"--plan: expected HARDWARE:SHAPE such as v5p:4x4x4 or h100:8, got {text!r}{hint}; hardware: "
            f"{', '.join(known)}"
        )
    if name in GPUS and "x" in shape:
        raise UserError(f"--plan: GPUs are planned as one box: expected {name}:COUNT such as {name}:8, got {text!r}")
    if 0 in map(int, shape.split("x")):
        raise UserError(f"--plan: needs at least one device, got {text!r}")
    try:
        return (
            Target(text, tpu_devices(text), TPU_MEMORY[name]) if name in TPU_MEMORY else _gpu_target(name, int(shape))
        )
    except UserError as error:
        raise UserError(f"--plan: {text}: {error}") from None
    except Exception as error:  # the compilers' plugins have no one kind of error
        raise UserError(
            f"--plan: {text}: the compiler refuses this topology: {' '.join(str(error).split())[:200]}"
        ) from None


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology that is not there, such as "v5e:2x2", for ahead-of-time compiles.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("no TPU compiler: python -m pip install 'jax[tpu]' (no TPU is needed)")
    # Without these the compiler looks for a TPU's metadata on the network, and refuses to be loaded twice on one
    # machine.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, platform="tpu").devices


def _gpu_target(name: str, count: int) -> Target:
    descriptions = gpu_descriptions()
    if GPUS[name] not in descriptions:
        raise UserError(
            f"the installed CUDA plugin does not know {GPUS[name]}; it knows {', '.join(sorted(descriptions))}"
        )
    description = descriptions[GPUS[name]]
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description, topology=f"1x1x{count}"
    )
    return Target(f"{name}:{count}", topology.devices, GPU_FRACTION * memory_bytes(description) / _GIB)


def make_plan(config: Config, hardware: Target) -> Plan:
    """Compiles the training step of a config for these devices.

    Raises:
      UserError: the mesh, the batch or the model do not go with them.
    """
    mesh = make_mesh(config.mesh, hardware.devices)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    parameters, optimizer, examples = (_bytes_per_device(x) for x in (state.params, state.opt_state, batch))
    arguments = parameters + optimizer + examples
    with jax.sharding.use_abstract_mesh(
        mesh.abstract_mesh
    ):  # kernels are chosen for the device that the step is compiled for
        lowered = make_step(config, mesh).lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:  # the TPU compiler makes no program that does not fit
            used, compiled = refused_bytes(str(error), arguments), None
            if used is None:
                raise
        else:
            used = _used_bytes(compiled)
    return Plan(
        hardware,
        mesh,
        parameters,
        optimizer,
        examples,
        max(used - arguments, 0),
        collectives(compiled.as_text()) if compiled else None,
        training_flops(config.model, config.data.sequence_length),
        config.data.batch_size * config.data.sequence_length,
    )


def run_plan(config: Config, text: str) -> bool:
    """Prints the plan of a config for the hardware that `text` names, and returns whether it fits.

    Raises:
      UserError: see `target` and `make_plan`.
    """
    jax.config.update(
        "jax_platforms", "cpu"
    )  # no device is needed: one that is there, or a library of one that is not, stays untouched
    config = with_vocabulary(config)
    plan = make_plan(config, target(text))
    print(describe(plan, config))
    return plan.fits


def _used_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def refused_bytes(message: str, arguments: int) -> int | None:
    """The bytes that a program would have used, from the TPU compiler's refusal to make it; None for another error.

    It tells of all that the program uses or, where that is too much already, of what it uses beside its arguments.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    beside = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", message)
    match = used or beside
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1)) + (0 if used else arguments) if match else None


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of tokens, as the data pipeline gives them."""
    sharding, shape = batch_sharding(config, mesh), (config.data.batch_size, config.data.sequence_length)
    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in kinds.items()}


def _bytes_per_device(tree: object) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def with_vocabulary(config: Config) -> Config:
    """The config with the vocabulary that its tokenizer will have, without reading any data."""
    if config.model.inputs != "tokens":
        raise UserError(f"--plan: plans models of tokens, got model.inputs={config.model.inputs}")
    data = config.data
    size = config.model.vocab_size or (
        data.bpe_vocab_size if data.tokenizer == "bpe" else TOKENIZERS["bytes"].train((), 0).vocab_size
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def describe(plan: Plan, config: Config) -> str:
    """The plan in words and figures, as --plan prints it."""
    axes = " x ".join(f"{name}={size}" for name, size in plan.mesh.shape.items())
    room = plan.target.memory_gib * _GIB
    verdict = f"{'fits' if plan.fits else 'DOES NOT FIT'} in {_size(room)} ({100 * plan.total / room:.0f} %)"
    lines = [
        f"{config.model.preset} on {plan.target.name}: {plan.mesh.size} devices ({axes}), {plan.tokens_per_step:,} "
        "tokens a step; on each device:",
        f"  parameters             {_size(plan.parameters):>11}   float32",
        f"  optimizer              {_size(plan.optimizer):>11}",
        f"  batch                  {_size(plan.batch):>11}",
        f"  gradients, activations {_size(plan.temporary):>11}   what the compiler needs beside them",
        f"  together               {_size(plan.total):>11}   {verdict}",
        f"  FLOPs                  {plan.step_flops:11.3e}   a step; {plan.flops_per_token:.3e} a token{_bound(plan)}",
    ]
    for kind in plan.collectives or ():
        lines.append(f"  {kind.name:22} {_size(kind.bytes):>11}   a step, {kind.count} times")
    if plan.target.name.partition(":")[0] in GPUS:
        lines.append(
            f"  counted are {GPU_FRACTION:.0%} of a GPU: start the run with "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_FRACTION}"
        )
    if not plan.fits:
        lines.append(f"  suggestion: {suggestion(plan, config)}")
    return "\n".join(lines)


def _size(count: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{count / _GIB:.2f} GiB" if count >= 0.1 * _GIB else f"{count / 2**20:.2f} MiB"


def _bound(plan: Plan) -> str:
    peak = peak_flops(plan.mesh.devices.flat[0].device_kind)
    return (
        f"; at the peak of {peak / 1e12:.0f} TFLOP/s {1e3 * plan.step_flops / peak:.3g} ms a step, in practice more"
        if peak
        else ""
    )


def suggestion(plan: Plan, config: Config) -> str:
    """What to change first where a plan does not fit: what takes most of the memory decides."""
    room = plan.target.memory_gib * _GIB
    held = plan.parameters + plan.optimizer
    if held > 0.7 * room:
        ways = plan.mesh.shape["fsdp"] * math.ceil(held / (0.5 * room))
        most = plan.mesh.size // (plan.mesh.shape["tensor"] * plan.mesh.shape["sequence"])
        if ways <= most:
            return (
                f"parameters and moments take {held / _GIB:.1f} GiB: --set "
                f"mesh.fsdp={_next_divisor(most, ways)} splits them further"
            )
        return (
            f"parameters and moments take {held / _GIB:.1f} GiB, split over all that there is: take a larger topology"
        )
    loops = uses_scan(config.model, plan.mesh.devices.flat[0].platform)
    if config.model.remat == "none" and (follows_remat(config.model) or not loops):
        return "activations take most: --set model.remat=layer recomputes them in the backward pass"
    examples = config.data.batch_size // (plan.mesh.shape["data"] * plan.mesh.shape["fsdp"])
    if examples % (2 * config.optimizer.accumulation_steps) == 0:
        return (
            "activations take most: --set "
            f"optimizer.accumulation_steps={2 * config.optimizer.accumulation_steps} halves what is held at once"
        )
    return (
        "activations take most: a larger mesh.tensor or mesh.sequence, a shorter data.sequence_length, or more devices"
    )


def _next_divisor(number: int, least: int) -> int:
    return next(i for i in range(least, number + 1) if number % i == 0)
