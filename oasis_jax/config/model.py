"""What a model is: attention, norms, MLPs, routers, and how layers are connected.

Module configs are mixins (`AttentionConfig`, `NormConfig`, `MLPConfig`, `RouterConfig`), so that `Attention` or a
router can be built alone with only what it reads, and a `ModelConfig` can be passed wherever one of them is asked for.
"""

import copy
import dataclasses
from typing import TYPE_CHECKING, Literal

from oasis_jax.config.methods import METHOD_FIELDS, PRESETS
from oasis_jax.config.schema import check_fields, check_minimum, field
from oasis_jax.errors import UserError, unknown_name

_SMALLEST = 2.0**-126  # of the numbers that float32 holds in full; devices take smaller ones for 0

Normalizer = Literal[
    "softmax", "softmax1", "learned_sink", "null_key", "null_key_value", "token_null", "clipped", "entmax15",
    "sparsemax", "softpick",
]  # fmt: skip
Gate = Literal["none", "elementwise", "per_head", "affine"]
_GATE = "on heads' outputs: a sigmoid gate of each channel or each head, or affine scaling (arXiv 2602.23057)"
DepthNormalizer = Literal["softmax", "softmax1", "sigmoid", "uniform"]
if TYPE_CHECKING:
    Preset = str  # a type checker cannot read the table
else:
    Preset = Literal[tuple(PRESETS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which norm a sublayer reads through (preaffine, gatednorm: arXiv 2601.22966; dyt: arXiv 2503.10622)."""

    norm: Literal["rmsnorm", "layernorm", "preaffine", "gatednorm", "dyt", "none"] = field(
        "rmsnorm", "norm before each sublayer and before the head; layernorm has a bias"
    )
    norm_epsilon: float = field(
        1e-6, "added to the mean square or variance inside a norm, that of queries and keys too"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """One feed-forward layer: SwiGLU (arXiv 2002.05202) where it is gated with silu."""

    width: int = field(128, "model width D")
    mlp_dim: int = field(0, "hidden size of the MLP; 0: 8/3 of width, rounded up to a multiple of 32")
    mlp_activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = field(
        "silu", "activation; gelu_tanh: the approximation"
    )
    mlp_gated: bool = field(True, "the activation of a second projection multiplies the first")
    mlp_bias: bool = field(False, "biases on the MLP's projections")
    mlp_rotation: int = field(
        0, "hidden activations pass a Hadamard transform of blocks of this size before the down projection; 0: none"
    )

    def __post_init__(self) -> None:
        check_fields(self, "mlp")
        self.check_mlp("mlp")

    def check_mlp(self, section: str) -> None:
        """Raises UserError where the numbers do not fit together."""
        check_minimum(self, section, width=1, mlp_dim=0, mlp_rotation=0)
        size = self.mlp_rotation
        if size and (size & (size - 1) or self.mlp_size % size):
            raise UserError(
                f"{section}.mlp_rotation: must be a power of two that divides the hidden size {self.mlp_size}, got "
                f"{size}"
            )

    @property
    def mlp_size(self) -> int:
        return self.mlp_dim or -(-8 * self.width // 3 // 32) * 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for texts longer than those of pretraining; see `oasis_jax.model.rotary`.

    Attributes:
      kind: linear (arXiv 2306.15595), llama3, yarn (arXiv 2309.00071), longrope (arXiv 2402.13753).
      factor: by how much texts may be longer.
      original_length: of pretraining.
      low_frequency_factor, high_frequency_factor: llama3: turns within the original length below and above which a
        channel is divided by factor, or stays.
      beta_fast, beta_slow: yarn: the same two bounds.
      truncate: yarn: the channels at the bounds are rounded to whole numbers.
      short_factors, long_factors: longrope: what each frequency is divided by, up to the original length and beyond it.
      attention_factor: of cosine and sine; 0: as the kind defines it from factor and original_length.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        section = "model.rope_scaling"
        check_fields(self, section)
        check_minimum(
            self, section, factor=1.0, original_length=0 if self.kind == "linear" else 1, attention_factor=0.0
        )
        if self.kind == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise UserError(
                f"{section}.low_frequency_factor: must lie between 0 and "
                f"high_frequency_factor={self.high_frequency_factor}, "
                f"got {self.low_frequency_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"{section}.beta_slow: must lie between 0 and beta_fast={self.beta_fast}, got {self.beta_slow}"
            )
        if self.kind == "longrope" and (not self.long_factors or len(self.short_factors) != len(self.long_factors)):
            raise UserError(
                f"{section}.short_factors: longrope needs as many short as long factors, at least one, "
                f"got {len(self.short_factors)} and {len(self.long_factors)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPattern:
    """What may differ from layer to layer."""

    window: int = 0  # keep keys with 0 <= i - j < window; 0: all
    rope_theta: float = 10_000.0  # base of rotary positions; 0: none

    def __post_init__(self) -> None:
        check_fields(self, "model.layer_pattern")
        check_minimum(self, "model.layer_pattern", window=0, rope_theta=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One self-attention layer."""

    width: int = field(128, "model width D")
    num_heads: int = field(4, "query heads N")
    num_kv_heads: int = field(0, "key and value heads K, a divisor of num_heads; 0: as many as num_heads")
    head_dim: int = field(0, "head size H; 0: width // num_heads")
    normalizer: Normalizer = field("softmax1", "what turns attention scores into probabilities")
    null_keys: int = field(
        1, "null_key, null_key_value: how many null keys (and values) P, the length of a constant prefix"
    )
    null_bias: bool = field(
        False, "null_key, null_key_value: a learned null logit per head is added to the null keys' scores"
    )
    null_weight: float = field(
        1.0, "factor of the null's exponential, from 0, softmax, to 1; of normalizers with a null logit", low=0, high=1
    )
    null_value_weight: float = field(1.0, "null_key_value: factor of the null values", low=0, high=1)
    clip_gamma: float = field(0.0, "clipped softmax: lower stretch gamma (<= 0); 0: -clip_alpha / number of keys")
    clip_zeta: float = field(1.0, "clipped softmax: upper stretch zeta (>= 1)")
    clip_alpha: float = field(4.0, "clipped softmax: alpha, used where clip_gamma is 0", low=0)
    gate: Gate = field("none", _GATE)
    qkv_bias: bool = field(False, "biases on queries, keys and values")
    output_bias: bool = field(False, "bias on the output projection")
    qk_norm: bool = field(False, "RMSNorm with gain on queries and keys, per head, before rotary positions")
    norm_epsilon: float = field(1e-6, NormConfig.__dataclass_fields__["norm_epsilon"].metadata["help"], low=0, high=1)
    attention_scale: float = field(0.0, "factor of the scores; 0: head size ** -0.5")
    rope_theta: float = field(10_000.0, "base of rotary positions; 0: no rotary positions")
    rope_fraction: float = field(1.0, "share of a head's channels that turn with the position, the first ones")
    rope_scaling: RopeScaling | None = field(None, "how rotary frequencies are changed for longer texts")
    window: int = field(0, "keep keys with 0 <= i - j < window; 0: all")
    logit_softcap: float = field(0.0, "cap * tanh(scores / cap); 0: none")
    attention_implementation: str = field(
        "auto", "backend of pallas_kernels.null_attention; auto: the fastest that can serve"
    )

    def __post_init__(self) -> None:
        check_fields(self, "attention")
        self.check()

    def check(self, section: str = "attention") -> None:
        """Raises UserError where the numbers do not fit together."""
        check_minimum(
            self, section, width=1, num_heads=1, num_kv_heads=0, head_dim=0, window=0, logit_softcap=0.0,
            rope_theta=0.0, clip_zeta=1.0, attention_scale=0.0, norm_epsilon=0.0, null_keys=1,
        )  # fmt: skip
        if self.num_heads % self.key_heads:
            raise UserError(f"{section}.num_kv_heads: {self.key_heads} does not divide num_heads={self.num_heads}")
        if not self.head_dim and self.width % self.num_heads:
            raise UserError(
                f"{section}.num_heads: {self.num_heads} does not divide width={self.width}; give head_dim or "
                "another number"
            )
        if not 0 < self.rope_fraction <= 1:
            raise UserError(f"{section}.rope_fraction: must lie above 0 and not above 1, got {self.rope_fraction}")
        if self.rope_theta and self.rotary_size % 2:
            raise UserError(
                f"{section}.head_dim: rotary positions need an even number of channels, got {self.rotary_size} of "
                "head size "
                f"{self.head_size}; or set rope_theta=0"
            )
        scaling = self.rope_scaling
        if scaling and scaling.kind == "longrope" and len(scaling.long_factors) != self.rotary_size // 2:
            raise UserError(
                f"{section}.rope_scaling: longrope needs a factor for each of the {self.rotary_size // 2} frequencies, "
                f"got {len(scaling.long_factors)}"
            )
        if self.null_value_weight != 1.0 and self.normalizer != "null_key_value":
            raise UserError(f"{section}.null_value_weight: goes with normalizer=null_key_value, got {self.normalizer}")
        if self.null_bias and self.normalizer not in ("null_key", "null_key_value"):
            raise UserError(
                f"{section}.null_bias: goes with normalizer=null_key or null_key_value, got {self.normalizer}"
            )
        if self.clip_gamma > 0:
            raise UserError(f"{section}.clip_gamma: must be at most 0, got {self.clip_gamma}")

    @property
    def key_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def rotary_size(self) -> int:
        """How many of a head's channels turn."""
        return int(self.head_size * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        return self.attention_scale or self.head_size**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One depth router: projected (arXiv 2605.17887) or static (arXiv 2603.15031)."""

    width: int = field(128, "model width D")
    router: Literal["projected", "static", "qkv"] = field(
        "projected",
        "how the query over depth is made; qkv: as static, over sources that are normalized without a gain, and the "
        "inputs of an attention's queries, keys and values are routed apart",
    )
    depth_normalizer: DepthNormalizer = field(
        "softmax1",
        "normalizer over depth sources; sigmoid: of each source's score alone, in plain JAX; uniform: equal weights, "
        "nothing learned",
    )
    coupling: bool = field(True, "weigh sources by the null mass of their attention (inter-layer null signal)")
    fixed_beta: float = field(
        0.0, "coupling: the strength beta of the inter-layer null signal as a number; 0: learned", low=0, high=10
    )
    alpha_gate: bool = field(
        False, "a router's mixture m becomes v + alpha (m - v), v its newest source, alpha learned from 0 on"
    )
    sum_preserving: bool = field(
        False, "a router's mixture is multiplied by how many sources it weighs: equal weights give their sum"
    )
    recency_bias_init: float = field(0.0, "router=projected: where the recency bias starts")
    router_init_std: float = field(
        0.0, "router=projected: standard deviation that both projections are drawn with; 0: width ** -0.5"
    )
    depth_implementation: str = field("auto", "backend of pallas_kernels.depth_route; auto: the fastest that can serve")

    def __post_init__(self) -> None:
        check_fields(self, "router")
        self.check_router("router")

    def check_router(self, section: str) -> None:
        """Raises UserError where the fields do not fit together."""
        check_minimum(self, section, router_init_std=0.0)
        if self.fixed_beta and not self.coupling:
            raise UserError(f"{section}.fixed_beta: goes with coupling=True, got {self.fixed_beta} without")
        if self.depth_normalizer == "uniform" and self.coupling:
            raise UserError(f"{section}.coupling: depth_normalizer=uniform weighs by nothing; set coupling=False")
        if self.depth_normalizer == "sigmoid" and self.depth_implementation != "auto":
            raise UserError(
                f"{section}.depth_implementation: depth_normalizer=sigmoid has no kernel, it is plain JAX; leave it at "
                f"auto, got {self.depth_implementation}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(AttentionConfig, RouterConfig, MLPConfig, NormConfig):
    """A decoder. The method's fields default to their preset's: `ModelConfig(preset="oasis", num_layers=4)`."""

    preset: Preset = field("oasis", "the method that fills the fields marked 'of the preset'")
    normalizer: Normalizer = field(None, "what turns attention scores into probabilities")
    gate: Gate = field(None, _GATE)
    wiring: Literal["residual", "cumulative", "delta"] = field(None, "how sublayers are connected over depth")
    router: Literal["projected", "static", "qkv", "none"] = field(
        None, RouterConfig.__dataclass_fields__["router"].metadata["help"]
    )
    depth_normalizer: DepthNormalizer = field(
        None, RouterConfig.__dataclass_fields__["depth_normalizer"].metadata["help"]
    )
    coupling: bool = field(None, "weigh sources by the null mass of their attention (inter-layer null signal)")
    blocks: int = field(
        None, "delta wiring: sublayers are summed into this many sources; 0: every sublayer is a source"
    )
    output_norm: bool = field(
        None, "delta wiring: every sublayer's output is RMS-normalized, without a gain, before it joins its source"
    )
    num_layers: int = field(4, "layers, each one attention and one MLP", high=4096)
    layer_pattern: tuple[LayerPattern, ...] = field(
        (), "windows and rotary bases of a repeating group of layers, in place of window and rope_theta"
    )
    learned_positions: int = field(0, "rows of a table of learned positions; 0: none")
    position_offset: int = field(0, "added to every position, rotary and learned")
    embedding_multiplier: float = field(1.0, "factor of the embedding")
    residual_multiplier: float = field(1.0, "factor of every sublayer's output")
    logits_multiplier: float = field(1.0, "factor of the logits")
    context_length: int = field(0, "longest text the model was made for, in tokens; 0: no bound")
    residual_clip: float = field(0.0, "clip every new source to +-tau; 0: none")
    inputs: Literal["tokens", "vectors"] = field(
        "tokens", "token ids with a vocabulary head, or vectors with a linear head"
    )
    vocab_size: int = field(0, "vocabulary V, from the tokenizer, rounded up to a multiple of 8; 0: set by training")
    vector_dim: int = field(0, "size of input and output vectors (inputs=vectors); 0: set by training")
    tied_head: bool = field(True, "the head is the transposed embedding")
    dtype: Literal["float32", "bfloat16"] = field("float32", "compute type; parameters are always float32")
    remat: Literal["none", "dots", "layer"] = field(
        "none",
        "what the backward pass recomputes of layers without routers or run one by one: nothing, all but weight matrix "
        "products, or everything; loops that route always recompute everything",
    )
    stack: Literal["auto", "scan", "unroll"] = field(
        "auto", "training runs the layers as a loop or one by one; auto: a loop, except on CPUs"
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown_name("model.preset", self.preset, PRESETS)
        for name in METHOD_FIELDS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, PRESETS[self.preset][name])
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        check_fields(self, "model")
        self.check("model")

    def check(self, section: str = "model") -> None:
        """Raises UserError where the numbers do not fit together."""
        AttentionConfig.check(self, section)
        self.check_mlp(section)
        self.check_router(section)
        check_minimum(
            self, section, num_layers=1, residual_clip=0.0, blocks=0, vocab_size=0, vector_dim=0,
            learned_positions=0, position_offset=0, context_length=0,
        )  # fmt: skip
        if 0 < self.residual_clip < _SMALLEST:
            raise UserError(f"{section}.residual_clip: must be 0 or at least {_SMALLEST:.3g}, got {self.residual_clip}")
        for name, wiring in (("alpha_gate", "cumulative"), ("sum_preserving", "delta")):
            if getattr(self, name) and self.wiring != wiring:
                raise UserError(f"{section}.{name}: goes with wiring={wiring}, got wiring={self.wiring}")
        routers = {"residual": ("none",), "cumulative": ("projected", "static")}
        wanted = routers.get(self.wiring, ("projected", "static", "qkv"))
        if self.router not in wanted:
            raise UserError(
                f"{section}.router: wiring={self.wiring} goes with router={' or '.join(wanted)}, got {self.router}"
            )
        if self.blocks and self.wiring != "delta":
            raise UserError(
                f"{section}.blocks: only wiring=delta has blocks, got blocks={self.blocks} with wiring={self.wiring}"
            )
        if self.output_norm and self.wiring != "delta":
            raise UserError(f"{section}.output_norm: goes with wiring=delta, got wiring={self.wiring}")
        if self.blocks > 2 * self.num_layers:
            raise UserError(
                f"{section}.blocks: {self.blocks} blocks for {2 * self.num_layers} sublayers; at most one block a "
                "sublayer"
            )
        self._check_pattern(section)

    def _check_pattern(self, section: str) -> None:
        for entry in self.layer_pattern:
            if not isinstance(entry, LayerPattern):
                raise UserError(
                    f"{section}.layer_pattern: expected LayerPattern(window=..., rope_theta=...), got {entry!r}"
                )
        if self.layer_pattern and self.num_layers % len(self.layer_pattern):
            period = len(self.layer_pattern)
            raise UserError(
                f"{section}.layer_pattern: {period} entries do not divide num_layers={self.num_layers}; "
                f"take a multiple of {period} layers or another pattern"
            )
        for index in range(len(self.layer_pattern)):  # a rotary base may not go with the head size
            AttentionConfig.check(self.layer(index), section)

    @property
    def period(self) -> int:
        """After how many layers they repeat."""
        return len(self.layer_pattern) or 1

    def layer(self, index: int) -> "ModelConfig":
        """The config of one layer, whose window and rotary base are those that the pattern gives it."""
        if not self.layer_pattern:
            return self
        entry, found = self.layer_pattern[index % self.period], copy.copy(self)
        for name, value in dict(layer_pattern=(), window=entry.window, rope_theta=entry.rope_theta).items():
            object.__setattr__(found, name, value)  # checked already, as part of the whole
        return found

    def with_preset(self, preset: str) -> "ModelConfig":
        """This config with another method: the preset's fields are replaced, the others kept."""
        return dataclasses.replace(self, preset=preset, **dict.fromkeys(METHOD_FIELDS))
