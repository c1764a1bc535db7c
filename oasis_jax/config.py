"""The one schema of a run: frozen dataclasses for model, data, optimizer, mesh and run.

Every field carries its help line in `metadata["help"]`; a `Literal` type lists the names a field allows.
Module configs are mixins (`AttentionConfig`, `NormConfig`, `RouterConfig`), so that `Attention` or a router
can be built alone with only what it reads, and a `ModelConfig` can be passed wherever one of them is asked for.
"""

import dataclasses
import math
import typing
from typing import Literal

from oasis_jax.errors import UserError, unknown_name

# What a method fixes; everything else in ModelConfig is orthogonal to it. oasis and its baselines attnres_cumulative,
# softmax1, clipped, entmax15 and sparsemax: arXiv 2605.17887; attnres: 2603.15031; gated: 2306.12929; learned_sink:
# 2601.22966; oasis_blocks is ours: OASIS on the blocks of AttnRes.
_CUMULATIVE = dict(
    wiring="cumulative", router="projected", depth_normalizer="softmax", coupling=False, gate="none", blocks=0
)
PRESETS: dict[str, dict] = {
    "residual": _CUMULATIVE | dict(normalizer="softmax", wiring="residual", router="none"),
    "attnres": _CUMULATIVE | dict(normalizer="softmax", wiring="delta", router="static"),
    "attnres_cumulative": _CUMULATIVE | dict(normalizer="softmax"),
    "softmax1": _CUMULATIVE | dict(normalizer="softmax1"),
    "clipped": _CUMULATIVE | dict(normalizer="clipped"),
    "entmax15": _CUMULATIVE | dict(normalizer="entmax15"),
    "sparsemax": _CUMULATIVE | dict(normalizer="sparsemax"),
    "gated": _CUMULATIVE | dict(normalizer="softmax", gate="elementwise"),
    "learned_sink": _CUMULATIVE | dict(normalizer="learned_sink"),
    "oasis": _CUMULATIVE | dict(normalizer="softmax1", depth_normalizer="softmax1", coupling=True),
    "oasis_blocks": _CUMULATIVE
    | dict(
        normalizer="softmax1", wiring="delta", router="static", depth_normalizer="softmax1", coupling=True, blocks=8
    ),
}
METHOD_FIELDS = ("normalizer", "wiring", "router", "depth_normalizer", "coupling", "gate", "blocks")


def _field(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


def field_type(cls: type, name: str):
    """The resolved annotation of a config field."""
    return typing.get_type_hints(cls)[name]


def sections() -> dict[str, type]:
    """The sections of a Config by name, in order."""
    return {section.name: field_type(Config, section.name) for section in dataclasses.fields(Config)}


def _check(config, section: str) -> None:
    """Types and names of every field; the one place where a wrong value is turned into words."""
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), field_type(type(config), field.name)
        where = f"{section}.{field.name}"
        options = typing.get_args(hint)
        if typing.get_origin(hint) is Literal:
            if value not in options:
                raise unknown_name(where, value, options)
        elif hint in (int, float, bool, str):
            accepted = (int, float) if hint is float else hint
            if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
                raise UserError(f"{where}: expected {hint.__name__}, got {value!r} of type {type(value).__name__}")
            if hint is float and not math.isfinite(value):
                raise UserError(f"{where}: must be finite, got {value!r}")


def _at_least(config, section: str, **minimum: float) -> None:
    for name, low in minimum.items():
        if not getattr(config, name) >= low:
            raise UserError(f"{section}.{name}: must be at least {low}, got {getattr(config, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which norm a sublayer reads through (preaffine, gatednorm: arXiv 2601.22966)."""

    norm: Literal["rmsnorm", "preaffine", "gatednorm", "dyt", "none"] = _field(
        "rmsnorm", "norm before each sublayer and before the head"
    )
    norm_gate_rank: int = _field(16, "width of gatednorm's bottleneck")
    norm_epsilon: float = _field(1e-6, "added to the mean square inside RMSNorm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One self-attention layer."""

    width: int = _field(128, "model width D")
    num_heads: int = _field(4, "query heads N")
    num_kv_heads: int = _field(0, "key and value heads K, a divisor of num_heads; 0: as many as num_heads")
    head_dim: int = _field(0, "head size H; 0: width // num_heads")
    normalizer: Literal["softmax", "softmax1", "learned_sink", "clipped", "entmax15", "sparsemax", "softpick"] = _field(
        "softmax1", "what turns attention scores into probabilities"
    )
    clip_gamma: float = _field(0.0, "clipped softmax: lower stretch gamma (<= 0); 0: -clip_alpha / number of keys")
    clip_zeta: float = _field(1.0, "clipped softmax: upper stretch zeta (>= 1)")
    clip_alpha: float = _field(4.0, "clipped softmax: alpha, used where clip_gamma is 0")
    gate: Literal["none", "elementwise", "per_head"] = _field(
        "none", "sigmoid gate on each head's output before the output projection"
    )
    qk_norm: bool = _field(False, "RMSNorm with gain on queries and keys, per head")
    rope_theta: float = _field(10_000.0, "base of rotary positions; 0: no positions")
    window: int = _field(0, "keep keys with 0 <= i - j < window; 0: all")
    logit_softcap: float = _field(0.0, "cap * tanh(scores / cap); 0: none")
    attention_implementation: str = _field(
        "auto", "backend of pallas_kernels.null_attention; auto: the fastest that can serve"
    )

    def __post_init__(self):
        _check(self, "attention")
        self.check()

    def check(self, section: str = "attention") -> None:
        """Raises UserError where the numbers do not fit together."""
        _at_least(
            self,
            section,
            width=1,
            num_heads=1,
            num_kv_heads=0,
            head_dim=0,
            window=0,
            logit_softcap=0.0,
            rope_theta=0.0,
            clip_zeta=1.0,
        )
        if self.num_heads % self.key_heads:
            raise UserError(f"{section}.num_kv_heads: {self.key_heads} does not divide num_heads={self.num_heads}")
        if not self.head_dim and self.width % self.num_heads:
            raise UserError(
                f"{section}.num_heads: {self.num_heads} does not divide width={self.width}; give head_dim or "
                "another number"
            )
        if self.rope_theta and self.head_size % 2:
            raise UserError(
                f"{section}.head_dim: rotary positions need an even head size, got {self.head_size}; or set "
                "rope_theta=0"
            )
        if self.clip_gamma > 0:
            raise UserError(f"{section}.clip_gamma: must be at most 0, got {self.clip_gamma}")

    @property
    def key_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """One depth router: projected (arXiv 2605.17887) or static (arXiv 2603.15031)."""

    width: int = _field(128, "model width D")
    router: Literal["projected", "static"] = _field("projected", "how the query over depth is made")
    depth_normalizer: Literal["softmax", "softmax1"] = _field("softmax1", "normalizer over depth sources")
    coupling: bool = _field(True, "weigh sources by the null mass of their attention (inter-layer null signal)")
    depth_implementation: str = _field(
        "auto", "backend of pallas_kernels.depth_route; auto: the fastest that can serve"
    )

    def __post_init__(self):
        _check(self, "router")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(AttentionConfig, RouterConfig, NormConfig):
    """A decoder. The method's fields default to their preset's: `ModelConfig(preset="oasis", num_layers=4)`."""

    preset: Literal[tuple(PRESETS)] = _field("oasis", "the method that fills the fields marked 'of the preset'")
    normalizer: AttentionConfig.__annotations__["normalizer"] = _field(
        None, "what turns attention scores into probabilities"
    )
    gate: AttentionConfig.__annotations__["gate"] = _field(
        None, "sigmoid gate on each head's output before the output projection"
    )
    wiring: Literal["residual", "cumulative", "delta"] = _field(None, "how sublayers are connected over depth")
    router: Literal["projected", "static", "none"] = _field(None, "how the query over depth is made")
    depth_normalizer: RouterConfig.__annotations__["depth_normalizer"] = _field(None, "normalizer over depth sources")
    coupling: bool = _field(None, "weigh sources by the null mass of their attention (inter-layer null signal)")
    blocks: int = _field(
        None, "delta wiring: sublayers are summed into this many sources; 0: every sublayer is a source"
    )
    num_layers: int = _field(4, "layers, each one attention and one MLP")
    mlp_dim: int = _field(0, "hidden size of SwiGLU; 0: 8/3 of width, rounded up to a multiple of 32")
    residual_clip: float = _field(0.0, "clip every new source to +-tau; 0: none")
    inputs: Literal["tokens", "vectors"] = _field(
        "tokens", "token ids with a vocabulary head, or vectors with a linear head"
    )
    vocab_size: int = _field(0, "vocabulary V, from the tokenizer, rounded up to a multiple of 8; 0: set by training")
    vector_dim: int = _field(0, "size of input and output vectors (inputs=vectors); 0: set by training")
    tied_head: bool = _field(True, "the head is the transposed embedding")
    dtype: Literal["float32", "bfloat16"] = _field("float32", "compute type; parameters are always float32")
    remat: Literal["none", "dots", "layer"] = _field(
        "none",
        "what the backward pass recomputes: nothing, all but weight matrix products, or everything; loops that "
        "route: always everything, but for none with blocks and static queries",
    )
    stack: Literal["auto", "scan", "unroll"] = _field(
        "auto", "training runs the layers as loops or one by one; auto: loops, except on CPUs"
    )

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise unknown_name("model.preset", self.preset, PRESETS)
        for name in METHOD_FIELDS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, PRESETS[self.preset][name])
        _check(self, "model")
        self.check("model")

    def check(self, section: str = "model") -> None:
        """Raises UserError where the numbers do not fit together."""
        AttentionConfig.check(self, section)
        _at_least(
            self,
            section,
            num_layers=1,
            mlp_dim=0,
            residual_clip=0.0,
            blocks=0,
            vocab_size=0,
            vector_dim=0,
            norm_gate_rank=1,
        )
        if (self.wiring == "residual") != (self.router == "none"):
            raise UserError(
                f"{section}.router: wiring={self.wiring} goes with "
                f"router={'none' if self.wiring == 'residual' else 'projected or static'}, got {self.router}"
            )
        if self.blocks and self.wiring != "delta":
            raise UserError(
                f"{section}.blocks: only wiring=delta has blocks, got blocks={self.blocks} with wiring={self.wiring}"
            )
        if self.blocks > 2 * self.num_layers:
            raise UserError(
                f"{section}.blocks: {self.blocks} blocks for {2 * self.num_layers} sublayers; at most one block a "
                "sublayer"
            )

    @property
    def mlp_size(self) -> int:
        return self.mlp_dim or -(-8 * self.width // 3 // 32) * 32

    def with_preset(self, preset: str) -> "ModelConfig":
        """This config with another method: the preset's fields are replaced, the others kept."""
        return dataclasses.replace(self, preset=preset, **dict.fromkeys(METHOD_FIELDS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from."""

    corpus: Literal["stdlib", "files", "trigger"] = _field(
        "stdlib", "Python's standard library as text, local files, or the trigger task"
    )
    pattern: str = _field("", "corpus=files: glob of .txt or .jsonl files")
    text_key: str = _field("text", "corpus=files: the key that holds the text in a .jsonl line")
    corrupt: Literal["stop", "skip"] = _field(
        "stop", "corpus=files: a file or line that cannot be read ends the run, or is named and left out"
    )
    tokenizer: Literal["bytes", "bpe"] = _field("bytes", "one token a byte, or a byte-level BPE trained on the corpus")
    bpe_vocab_size: int = _field(4096, "tokenizer=bpe: tokens to learn, special ones included")
    sequence_length: int = _field(256, "tokens T of an example")
    batch_size: int = _field(16, "examples of one optimizer step, over all devices")
    begin_token: bool = _field(True, "every example starts with a begin token")
    holdout_fraction: float = _field(0.05, "share of the corpus, by file, that is never trained on")
    trigger_dim: int = _field(16, "corpus=trigger: size of the random content of a vector")
    trigger_rate: float = _field(0.1, "corpus=trigger: share of positions that carry the trigger")

    def __post_init__(self):
        _check(self, "data")
        _at_least(self, "data", sequence_length=2, batch_size=1, bpe_vocab_size=258, trigger_dim=1)
        for name in ("holdout_fraction", "trigger_rate"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"data.{name}: must lie between 0 and 1, got {getattr(self, name)}")
        if self.corpus == "files" and not self.pattern:
            raise UserError("data.pattern: corpus=files needs a glob of .txt or .jsonl files")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = _field(3e-3, "peak learning rate")
    warmup_steps: int = _field(20, "steps of linear warm-up from 0")
    schedule: Literal["cosine", "linear", "constant"] = _field("cosine", "decay after the warm-up")
    final_fraction: float = _field(0.1, "learning rate at the last step, as a share of the peak")
    weight_decay: float = _field(0.1, "decoupled weight decay, on matrices only")
    beta1: float = _field(0.9, "decay of the first moment")
    beta2: float = _field(0.95, "decay of the second moment")
    epsilon: float = _field(1e-8, "added to the root of the second moment")
    clip_norm: float = _field(1.0, "largest global norm of the gradient; 0: no clipping")
    accumulation_steps: int = _field(1, "micro-batches whose gradients make one step; divides data.batch_size")
    nonfinite: Literal["stop", "skip"] = _field(
        "stop", "a loss or gradient that is not finite ends the run, or its step changes nothing"
    )
    nonfinite_limit: int = _field(10, "nonfinite=skip: so many skipped steps in a row end the run")

    def __post_init__(self):
        _check(self, "optimizer")
        _at_least(
            self,
            "optimizer",
            learning_rate=0.0,
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=0.0,
            accumulation_steps=1,
            final_fraction=0.0,
            nonfinite_limit=1,
        )


# Logical axis -> mesh axes it is split over. Parameters: vocab, embed, heads, kv_heads, mlp. Activations: batch,
# length, and stream, the length between sublayers: sources and norms are split over the tensor axis too (Korthikanti et
# al., arXiv 2205.05198).
DEFAULT_RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", ("fsdp",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("length", ("sequence",)),
    ("stream", ("sequence", "tensor")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are laid out and what is split over them."""

    data: int = _field(-1, "replicas that split the batch; -1: all devices the other axes leave")
    fsdp: int = _field(1, "devices that split the batch and the parameters")
    tensor: int = _field(1, "devices that split heads, MLP and vocabulary")
    sequence: int = _field(1, "devices that split the positions of an example; attention passes its keys around them")
    rules: tuple = _field(DEFAULT_RULES, "logical axis name -> mesh axes, the one table of what is split over what")

    def __post_init__(self):
        _check(self, "mesh")
        _at_least(self, "mesh", fsdp=1, tensor=1, sequence=1)
        if self.data == 0 or self.data < -1:
            raise UserError(f"mesh.data: must be -1 or at least 1, got {self.data}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is and what it writes."""

    steps: int = _field(300, "optimizer steps")
    init_from: str = _field(
        "", "workdir of another run: start from the parameters of its newest checkpoint; '': from random ones"
    )
    seed: int = _field(0, "seed of parameters, order of examples and everything random")
    log_interval: int = _field(1, "steps between lines of metrics.jsonl")
    telemetry_interval: int = _field(50, "steps between logs of null mass, first-token mass and beta; 0: never")
    eval_interval: int = _field(0, "steps between runs of the evaluators; 0: never")
    eval_batches: int = _field(8, "held-out batches an evaluation reads")
    checkpoint_interval: int = _field(100, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = _field(2, "newest checkpoints that are kept")
    keep_every: int = _field(0, "checkpoints of steps divisible by this are kept for good; 0: none")
    keep_best: int = _field(
        0,
        "checkpoints with the lowest eval/loss that are kept too; needs checkpoint_interval divisible by eval_interval",
    )
    tensorboard: bool = _field(False, "also write TensorBoard files (needs the tensorboard extra)")

    def __post_init__(self):
        _check(self, "run")
        _at_least(
            self,
            "run",
            steps=1,
            log_interval=1,
            telemetry_interval=0,
            eval_interval=0,
            eval_batches=1,
            checkpoint_interval=1,
            keep_checkpoints=1,
            keep_every=0,
            keep_best=0,
        )
        if self.keep_every and self.keep_every % self.checkpoint_interval:
            raise UserError(
                f"run.keep_every: {self.keep_every} is not a multiple of checkpoint_interval={self.checkpoint_interval}"
            )
        if self.keep_best and (not self.eval_interval or self.checkpoint_interval % self.eval_interval):
            raise UserError(
                f"run.keep_best: needs an evaluation at every checkpoint, but eval_interval={self.eval_interval} "
                f"does not divide checkpoint_interval={self.checkpoint_interval}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run; `configs/*.py` each return one from `get_config()`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self):
        if self.data.batch_size % self.optimizer.accumulation_steps:
            raise UserError(
                f"optimizer.accumulation_steps: {self.optimizer.accumulation_steps} does not divide "
                f"data.batch_size={self.data.batch_size}"
            )
        if (self.data.corpus == "trigger") != (self.model.inputs == "vectors"):
            needed = "vectors" if self.data.corpus == "trigger" else "tokens"
            raise UserError(f"model.inputs: corpus={self.data.corpus} needs inputs={needed}, got {self.model.inputs}")


def to_dict(config: Config) -> dict:
    """The config as plain nested dicts, as it is written into checkpoints."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`; raises UserError on fields this version does not know."""
    sections = {}
    for section in dataclasses.fields(Config):
        cls, given = field_type(Config, section.name), dict(values[section.name])
        known = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise unknown_name(f"{section.name}.{name}", name, known)
        if "rules" in given:
            given["rules"] = tuple((name, tuple(axes)) for name, axes in given["rules"])
        sections[section.name] = cls(**given)
    return Config(**sections)
