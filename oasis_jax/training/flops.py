"""How much arithmetic a model needs, counted from its config, and what share of a device's peak that is."""

import math
from collections.abc import Mapping

from oasis_jax.config import ModelConfig
from oasis_jax.model.attention import attention_parameters
from oasis_jax.model.decoder import ends_parameters
from oasis_jax.model.mlp import mlp_parameters
from oasis_jax.model.norms import norm_parameters
from oasis_jax.model.parameters import ParameterSpec
from oasis_jax.model.router import router_parameters
from oasis_jax.model.wiring import router_names

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
    norm = norm_parameters(config, config.width)
    layer = [attention_parameters(config), mlp_parameters(config.width, config.mlp_size), norm, norm]
    layers = config.num_layers * sum(map(_matrix_sizes, layer)) + _matrix_sizes(norm)
    seen = _mean_keys(length, config.window)
    ends = ends_parameters(config)
    head = math.prod(ends["head" if "head" in ends else "embedding"].shape)
    embedding = 2.0 * math.prod(ends["embedding"].shape) if config.inputs == "vectors" else 0.0
    return {
        "linear": 2.0 * layers + embedding,
        "attention": 4.0 * config.num_layers * config.num_heads * config.head_size * seen,
        "routing": _routing(config),
        "head": 2.0 * head,
    }


def training_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a training step per token: a forward pass and twice as much backward."""
    return 3.0 * sum(forward_flops(config, length).values())


def _matrix_sizes(specs: Mapping[str, ParameterSpec]) -> int:
    """The elements of all parameters with at least two dimensions: a token meets each of them in one multiply-add."""
    return sum(math.prod(spec.shape) for spec in specs.values() if len(spec.shape) >= 2)


def _mean_keys(length: int, window: int) -> float:
    """How many keys a query sees, on average over a sequence."""
    reach = min(window or length, length)
    return reach - reach * (reach - 1) / 2 / length


def _routing(config: ModelConfig) -> float:
    """A projected router makes its query with two products of width x key width; scores and sums are two FLOPs an
    element each.
    """
    names = router_names(config)
    if not names:
        return 0.0
    queries = 2.0 * len(names) * _matrix_sizes(router_parameters(config)) if config.router == "projected" else 0.0
    sources = [_num_sources(config, index) for index in range(len(names))]
    return queries + 4.0 * config.width * sum(sources)


def _num_sources(config: ModelConfig, index: int) -> int:
    """The sources of the router with this index."""
    if config.wiring == "cumulative":
        return index // 2 + 2 + index % 2
    sublayers = index + 1
    if not config.blocks:
        return sublayers + 1
    size = 2 * config.num_layers // config.blocks
    return 1 + min(-(-sublayers // size), config.blocks)
