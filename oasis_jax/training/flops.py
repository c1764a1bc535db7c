"""How much arithmetic a model needs, counted from its config, and what share of a device's peak that is."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from oasis_jax.config import ModelConfig
from oasis_jax.model.decoder import parameter_specs
from oasis_jax.model.parameters import ROLES, ParameterSpec
from oasis_jax.model.wiring import schedule

# Dense bfloat16 FLOP/s of one device, from its maker's data sheet, by the start of JAX's name of it.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None where it is not known (CPUs among them)."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def forward_flops(config: ModelConfig, length: int) -> dict[str, float]:
    """FLOPs of a forward pass, per token, by what needs them; a multiply-add is two.

    Counted is what the mathematics needs, not what an implementation does: recomputation is not, and of causal
    attention only the keys that a query sees.

    Args:
      config: with its vocabulary or vector size.
      length: tokens of a sequence.

    Returns:
      "linear": attention's and the MLPs' projections; "attention": scores and weighted values; "routing": the routers'
      queries, scores and weighted sums; "head": the output layer.
    """
    specs = parameter_specs(config)
    per_token = {name: _multiplied(group) for name, group in specs.items()}
    layers = [config.layer(index) for index in range(config.num_layers)]
    seen = sum(_mean_keys(length, layer.window) for layer in layers)
    table = math.prod(specs["embedding"]["table"].shape)
    steps = schedule(config).steps
    scored = 0.0 if config.depth_normalizer == "uniform" else 2.0
    queries = len(schedule(config).routers) * per_token.get("routers", 0)
    return {
        "linear": 2.0 * (config.num_layers * per_token["layers"] + per_token.get("final_norm", 0))
        + (2.0 * table if config.inputs == "vectors" else 0.0),
        "attention": 4.0 * config.num_heads * config.head_size * seen,
        # A projected router makes its query with two products; scores and sums are two FLOPs an element each.
        "routing": 2.0 * queries
        + (scored + 2.0) * config.width * sum(len(step.sources) * len(step.routers) for step in steps),
        "head": 2.0 * (per_token["head"] if "head" in specs else table),
    }


def training_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a training step per token: a forward pass and twice as much backward."""
    return 3.0 * sum(forward_flops(config, length).values())


def _multiplied(specs: Mapping[str, Any]) -> int:
    """The elements of all parameters whose role multiplies: a token meets each of them in one multiply-add."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParameterSpec))
    return sum(math.prod(spec.shape) for spec in leaves if ROLES[spec.role].multiplies)


def _mean_keys(length: int, window: int) -> float:
    """How many keys a query sees, on average over a sequence."""
    reach = min(window or length, length)
    return reach - reach * (reach - 1) / 2 / length
