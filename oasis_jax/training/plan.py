"""Whether a run will fit: its training step and its evaluation compiled ahead of time for hardware that is
not there, and what the compiler says of them.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from oasis_jax.config import Config
from oasis_jax.data import TOKENIZERS, load_corpus
from oasis_jax.errors import UserError, nearest
from oasis_jax.model.loop import uses_loop
from oasis_jax.placement import check_batch_size, make_mesh, place
from oasis_jax.storage import as_path, is_remote, reach
from oasis_jax.training.collectives import Collective, collectives
from oasis_jax.training.flops import peak_flops, training_flops
from oasis_jax.training.gpu_targets import GPUS, check_compiler
from oasis_jax.training.state import abstract_state
from oasis_jax.training.step import make_step
from oasis_jax.training.warm_start import with_source

# GiB of memory a device has for programs, by what precedes the colon of --plan; TPUs are named as their compiler names
# them.
TPU_MEMORY = {"v4": 32.0, "v5e": 16.0, "v5p": 95.0, "v6e": 32.0, "tpu7x": 96.0}
# JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more; CUDA and NCCL need the rest.
GPU_FRACTION = 0.92
_GIB = 2.0**30

# (config, mesh) -> the evaluation of a batch, lowered over abstract parameters:
# `oasis_jax.evaluation.lower_evaluation`.
LowerEvaluation = Callable[[Config, Mesh], jax.stages.Lowered]


class Target(NamedTuple):
    """Devices to compile for, and what each of them can hold."""

    name: str
    devices: Sequence[jax.Device]
    memory_gib: float


class Plan(NamedTuple):
    """What the programs of a run need, per device, in bytes."""

    target: Target
    mesh: Mesh
    parameters: int
    optimizer: int
    batch: int
    temporary: int
    collectives: list[Collective] | None  # None: the compiler refused to make a program of this size
    flops_per_token: float
    tokens_per_step: int
    evaluation: int | None = None  # all that an evaluation uses, parameters and batch included; None: not planned
    evaluated_while_training: bool = False  # so that the optimizer's moments lie beside it

    @property
    def total(self) -> int:
        """Of the training step."""
        return self.parameters + self.optimizer + self.batch + self.temporary

    @property
    def evaluations(self) -> dict[str, int]:
        """What evaluation uses, by where it runs."""
        alone = {} if self.evaluation is None else {"evaluation": self.evaluation}
        if alone and self.evaluated_while_training:
            return alone | {"evaluation in training": self.evaluation + self.optimizer}
        return alone

    @property
    def step_flops(self) -> float:
        """Of one device."""
        return self.flops_per_token * self.tokens_per_step / self.mesh.size

    @property
    def room(self) -> float:
        return self.target.memory_gib * _GIB

    @property
    def training_fits(self) -> bool:
        return self.collectives is not None and self.total <= self.room

    @property
    def fits(self) -> bool:
        """Whether training and evaluation do."""
        return self.training_fits and all(used <= self.room for used in self.evaluations.values())


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
    check_compiler()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=GPUS[name].description, topology=f"1x1x{count}"
    )
    return Target(f"{name}:{count}", topology.devices, GPU_FRACTION * GPUS[name].memory / _GIB)


def make_plan(
    config: Config,
    hardware: Target,
    lower_evaluation: LowerEvaluation | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles the training step of a config for these devices and, where it is given, the evaluation.

    Args:
      config: with its vocabulary.
      hardware: see `target`.
      lower_evaluation: see `LowerEvaluation`.
      say: told what is being compiled, which takes minutes for a large model.

    Raises:
      UserError: the mesh, the batch or the model do not go with them.
    """
    mesh = make_mesh(config.mesh, hardware.devices)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    parameters, optimizer, examples = (_bytes_per_device(x) for x in (state.params, state.opt_state, batch))
    arguments, evaluation = parameters + optimizer + examples, None
    # Kernels are chosen for the device that the programs are compiled for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        say("compiling the training step")
        used, compiled = _compile(make_step(config, mesh).lower(state, batch), arguments)
        if lower_evaluation:
            say("compiling the evaluation")
            evaluation, _ = _compile(lower_evaluation(config, mesh), parameters + examples)
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
        evaluation,
        config.run.eval_interval > 0,
    )


def run_plan(config: Config, text: str, lower_evaluation: LowerEvaluation | None = None) -> bool:
    """Prints the plan of a config for the hardware that `text` names, and returns whether it fits.

    Raises:
      UserError: see `target` and `make_plan`.
    """
    # No device is needed: one that is there, or a library of one that is not, stays untouched.
    jax.config.update("jax_platforms", "cpu")
    if config.model.inputs != "tokens":
        raise UserError(f"--plan: plans models of tokens, got model.inputs={config.model.inputs}")
    config = with_vocabulary(config)
    plan = make_plan(config, target(text), lower_evaluation, lambda what: print(f"{what} ...", file=sys.stderr))
    print(describe(plan, config))
    return plan.fits


def _compile(lowered: jax.stages.Lowered, arguments: int) -> tuple[int, jax.stages.Compiled | None]:
    """(bytes that the program uses on a device, the program); None where it is so large that its compiler refused."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = refused_bytes(str(error), arguments)
        if used is None:
            raise
        return used, None
    return _used_bytes(compiled), compiled


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
    """Shapes and shardings of a batch of tokens, as the data pipeline gives them.

    Raises:
      UserError: a batch that the mesh does not divide.
    """
    placement, shape = place(config, mesh), (config.data.batch_size, config.data.sequence_length)
    check_batch_size(config, placement)
    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.segmented:
        kinds |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    sharding = placement.sharding(("batch",))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in kinds.items()}


def _bytes_per_device(tree: object) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def with_vocabulary(config: Config) -> Config:
    """The config with the sizes of the pretrained model that it starts from, where it does; with the vocabulary that
    its tokenizer will have, or the size of its task's vectors. No text is read. A model that is not at hand and whose
    vocabulary the config states is not asked for: the config states its other sizes, too.
    """
    if not config.model.vocab_size or _exists(config.run.init_from):
        config = with_source(config)
    model, data = config.model, config.data
    if model.inputs == "vectors":
        sizes = {"vector_dim": model.vector_dim or load_corpus(data, seed=config.run.seed).vector_dim}
    else:
        trained = data.bpe_vocab_size if data.tokenizer == "bpe" else 0
        sizes = {"vocab_size": model.vocab_size or trained or TOKENIZERS[data.tokenizer].train((), 0).vocab_size}
    return dataclasses.replace(config, model=dataclasses.replace(model, **sizes))


def _exists(source: str) -> bool:
    path = as_path(source, "run.init_from")
    return reach(path, "run.init_from") is not None if is_remote(path) else path.exists()


def describe(plan: Plan, config: Config) -> str:
    """The plan in words and figures, as --plan prints it."""
    axes = " x ".join(f"{name}={size}" for name, size in plan.mesh.shape.items())
    lines = [
        f"{config.model.preset} on {plan.target.name}: {plan.mesh.size} devices ({axes}), {plan.tokens_per_step:,} "
        "tokens a step; on each device:",
        f"  parameters             {_size(plan.parameters):>11}   float32",
        f"  optimizer              {_size(plan.optimizer):>11}",
        f"  batch                  {_size(plan.batch):>11}",
        f"  gradients, activations {_size(plan.temporary):>11}   what the compiler needs beside them",
        f"  together               {_size(plan.total):>11}   {_verdict(plan, plan.total, plan.training_fits)}",
        f"  FLOPs                  {plan.step_flops:11.3e}   a step; {plan.flops_per_token:.3e} a token{_bound(plan)}",
    ]
    for kind in plan.collectives or ():
        lines.append(f"  {kind.name:22} {_size(kind.bytes):>11}   a step, {kind.count} times")
    for name, used in plan.evaluations.items():
        verdict = _verdict(plan, used, used <= plan.room)
        beside = ", with the optimizer beside it" if name != "evaluation" else ""
        lines.append(f"  {name:22} {_size(used):>11}   together{beside}, {verdict}")
    if plan.target.name.partition(":")[0] in GPUS:
        lines.append(
            f"  counted are {GPU_FRACTION:.0%} of a GPU: start the run with "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_FRACTION}"
        )
    if not plan.fits:
        lines.append(f"  suggestion: {suggestion(plan, config)}")
    return "\n".join(lines)


def _verdict(plan: Plan, used: int, fits: bool) -> str:
    share = 100 * used / plan.room
    return f"{'fits' if fits else 'DOES NOT FIT'} in {_size(plan.room)} ({share:.0f} %)"


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
    held = plan.parameters + plan.optimizer
    if held > 0.7 * plan.room:
        ways = plan.mesh.shape["fsdp"] * math.ceil(held / (0.5 * plan.room))
        most = plan.mesh.size // (plan.mesh.shape["tensor"] * plan.mesh.shape["sequence"])
        takes = f"parameters and moments take {held / _GIB:.1f} GiB"
        if ways <= most:
            return f"{takes}: --set mesh.fsdp={_next_divisor(most, ways)} splits them further"
        return f"{takes}, split over all that there is: take a larger topology"
    if plan.training_fits:
        return (
            "the evaluation takes most: a larger mesh.tensor or mesh.sequence, a smaller "
            "data.batch_size, or more devices"
        )
    loops = uses_loop(config.model, plan.mesh.devices.flat[0].platform)
    if config.model.remat == "none" and (config.model.wiring == "residual" or not loops):
        return "activations take most: --set model.remat=layer recomputes them in the backward pass"
    steps = config.optimizer.accumulation_steps
    examples = config.data.batch_size // (plan.mesh.shape["data"] * plan.mesh.shape["fsdp"])
    if examples % (2 * steps) == 0:
        return f"activations take most: --set optimizer.accumulation_steps={2 * steps} halves what is held at once"
    return (
        "activations take most: a larger mesh.tensor or mesh.sequence, a shorter data.sequence_length, or more devices"
    )


def _next_divisor(number: int, least: int) -> int:
    return next(i for i in range(least, number + 1) if number % i == 0)
