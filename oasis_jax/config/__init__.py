"""The one schema of a run: frozen dataclasses for model, data, optimizer, mesh and run.

Every field carries its help line in `metadata["help"]`; a `Literal` type lists the names a field allows.
"""

from oasis_jax.config.methods import METHOD_FIELDS, PRESETS
from oasis_jax.config.model import (
    AttentionConfig,
    LayerPattern,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeScaling,
    RouterConfig,
)
from oasis_jax.config.run import (
    DEFAULT_RULES,
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    from_dict,
    sections,
    to_dict,
)
from oasis_jax.config.schema import field_type

__all__ = [
    "DEFAULT_RULES",
    "METHOD_FIELDS",
    "PRESETS",
    "AttentionConfig",
    "Config",
    "DataConfig",
    "LayerPattern",
    "MLPConfig",
    "MeshConfig",
    "ModelConfig",
    "NormConfig",
    "OptimizerConfig",
    "RopeScaling",
    "RouterConfig",
    "RunConfig",
    "field_type",
    "from_dict",
    "sections",
    "to_dict",
]
