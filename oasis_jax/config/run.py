"""A run: where its examples come from, how it is optimized, split over devices and written down."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from oasis_jax.config.model import LayerPattern, ModelConfig, RopeScaling
from oasis_jax.config.schema import build, check_fields, field, field_type
from oasis_jax.errors import UserError

LARGEST_HOLDOUT = 0.9  # more would be a mistake: nothing is learned from the rest


def sections() -> dict[str, type]:
    """The sections of a Config by name, in order."""
    return {section.name: field_type(Config, section.name) for section in dataclasses.fields(Config)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from."""

    corpus: Literal["stdlib", "files", "pairs", "prepared", "trigger", "backcopy"] = field(
        "stdlib",
        "Python's standard library as text, local files, questions and answers with the loss on answers alone, what "
        "`oasis_jax prepare` wrote, or a task that makes sinks: trigger (vectors), backcopy (tokens)",
    )
    pattern: str = field(
        "",
        "corpus=files: glob of .txt or .jsonl files; corpus=pairs: of .jsonl files with question and answer; "
        "corpus=prepared: the folder, or several with commas between where there is a mixture; "
        "corpus=backcopy: as for files, '': the text of stdlib",
    )
    mixture: str = field(
        "", "corpus=prepared: the share of examples from each folder of the pattern, such as 0.7,0.3; '': one folder"
    )
    text_key: str = field("text", "corpus=files: the key that holds the text in a .jsonl line")
    corrupt: Literal["stop", "skip"] = field(
        "stop", "corpus=files: a file or line that cannot be read ends the run, or is named and left out"
    )
    tokenizer: Literal["bytes", "bpe", "library", "sentencepiece", "tiktoken"] = field(
        "bytes",
        "one token a byte; a byte-level BPE trained on the corpus; that of the pretrained model it starts from; or, of "
        "what `oasis_jax prepare` wrote, the kind it was written with",
    )
    bpe_vocab_size: int = field(4096, "tokenizer=bpe: tokens to learn, special ones included", low=258)
    sequence_length: int = field(256, "tokens T of an example", low=2)
    batch_size: int = field(16, "examples of one optimizer step, over all devices", low=1)
    packing: Literal["stream", "split", "best_fit", "group_texts"] = field(
        "stream",
        "how documents become examples: one stream, cut, with attention across documents; the same with attention "
        "within documents; documents whole, each in the row that it fits best, with attention within them; or 1,000 "
        "texts joined, cut, the rest left out, as transformers' run_clm does",
    )
    begin_token: bool = field(True, "every example starts with a begin token")
    holdout_fraction: float = field(0.05, "share of the corpus that is never trained on", above=0, high=LARGEST_HOLDOUT)
    begin_content: bool = field(
        False, "corpus=trigger: the begin token has content of its own, which belongs to the means"
    )
    trigger_dim: int = field(16, "corpus=trigger: size of the random content of a vector", low=1)
    trigger_rate: float = field(0.1, "corpus=trigger: share of positions that carry the trigger", above=0, below=1)
    trigger_characters: int = field(
        3, "corpus=backcopy: so many of the text's most frequent bytes are triggers", low=1, below=256
    )

    def __post_init__(self) -> None:
        check_fields(self, "data")
        needs = {
            "files": "a glob of .txt or .jsonl files",
            "prepared": "the folder that `oasis_jax prepare` wrote",
            "pairs": "a glob of .jsonl files",
        }
        if self.begin_content and not (self.corpus == "trigger" and self.begin_token):
            raise UserError("data.begin_content: only the begin token of corpus=trigger has content")
        if self.corpus in needs and not self.pattern:
            raise UserError(f"data.pattern: corpus={self.corpus} needs {needs[self.corpus]}")
        packed = ("stdlib", "files", "prepared")
        if self.packing != "stream" and self.corpus not in packed:
            raise UserError(
                f"data.packing: goes with corpus={', '.join(packed)}, got corpus={self.corpus}, whose examples are "
                "what they are"
            )
        if self.mixture and self.corpus != "prepared":
            raise UserError(f"data.mixture: goes with corpus=prepared, got corpus={self.corpus}")

    @property
    def segmented(self) -> bool:
        """Whether an example holds several documents that do not see each other."""
        return self.corpus == "pairs" or self.packing in ("split", "best_fit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon", "sgd"] = field(
        "adamw",
        "muon: matrices by Muon, everything else, embeddings and the head too, by AdamW; sgd: with momentum beta1",
    )
    learning_rate: float = field(3e-3, "peak learning rate", low=0)
    warmup_steps: int = field(20, "steps of linear warm-up from 0", low=0)
    schedule: Literal["cosine", "linear", "constant"] = field("cosine", "decay after the warm-up")
    final_fraction: float = field(0.1, "learning rate at the last step, as a share of the peak", low=0, high=1)
    router_multiplier: float = field(1.0, "learning rate of the depth routers, as a multiple of the others'", low=0)
    null_ramp_steps: int = field(
        0,
        "steps over which model.null_weight grows from 0, softmax, to what it is; 0: it is there from the start",
        low=0,
    )
    null_value_fade_steps: int = field(
        0, "steps over which model.null_value_weight falls from what it is to 0; 0: it stays", low=0
    )
    weight_decay: float = field(0.1, "decoupled weight decay, on matrices and embeddings only", low=0)
    beta1: float = field(0.9, "decay of the first moment, or of the momentum of sgd", low=0, below=1)
    beta2: float = field(0.95, "decay of the second moment", low=0, below=1)
    epsilon: float = field(1e-8, "added to the root of the second moment", low=0, high=1)
    clip_norm: float = field(1.0, "largest global norm of the gradient; 0: no clipping", low=0)
    accumulation_steps: int = field(1, "micro-batches whose gradients make one step; divides data.batch_size", low=1)
    nonfinite: Literal["stop", "skip"] = field(
        "stop", "a loss or gradient that is not finite ends the run, or its step changes nothing"
    )
    nonfinite_limit: int = field(10, "nonfinite=skip: so many skipped steps in a row end the run", low=1)

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


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

    data: int = field(-1, "replicas that split the batch; -1: all devices the other axes leave")
    fsdp: int = field(1, "devices that split the batch and the parameters", low=1)
    tensor: int = field(1, "devices that split heads, MLP and vocabulary", low=1)
    sequence: int = field(
        1, "devices that split the positions of an example; attention passes its keys around them", low=1
    )
    rules: tuple[tuple[str, tuple[str, ...]], ...] = field(
        DEFAULT_RULES, "logical axis name -> mesh axes, the one table of what is split over what"
    )

    def __post_init__(self) -> None:
        check_fields(self, "mesh")
        if self.data == 0 or self.data < -1:
            raise UserError(f"mesh.data: must be -1 or at least 1, got {self.data}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is and what it writes."""

    steps: int = field(300, "optimizer steps", low=1)
    init_from: str = field(
        "",
        "start from the parameters of another run's newest checkpoint (its workdir), or of a pretrained model (its "
        "folder, .gguf file or owner/name on a hub), which then says how large this one is; '': from random ones",
    )
    init_null: Literal["none", "one_per_cent", "transplant"] = field(
        "none",
        "where the null of a model from init_from starts: as the normalizer says; at one per cent of the mass of each "
        "head (normalizer=learned_sink); or with the key and value of its begin token (normalizer=null_key_value)",
    )
    seed: int = field(0, "seed of parameters, order of examples and everything random", low=0)
    log_interval: int = field(1, "steps between lines of metrics.jsonl", low=1)
    telemetry_interval: int = field(50, "steps between logs of null mass, first-token mass and beta; 0: never", low=0)
    eval_interval: int = field(0, "steps between runs of the evaluators; 0: never", low=0)
    eval_batches: int = field(8, "held-out batches an evaluation reads", low=1)
    checkpoint_interval: int = field(100, "steps between checkpoints; the last step is always saved", low=1)
    keep_checkpoints: int = field(2, "newest checkpoints that are kept", low=1)
    keep_every: int = field(0, "checkpoints of steps divisible by this are kept for good; 0: none", low=0)
    keep_best: int = field(
        0,
        "checkpoints with the lowest eval/loss that are kept too; needs checkpoint_interval divisible by eval_interval",
        low=0,
    )
    tensorboard: bool = field(False, "also write TensorBoard files (needs the tensorboard extra)")
    wandb: bool = field(
        False, "also log to Weights & Biases (needs the wandb extra), which reads WANDB_PROJECT, WANDB_MODE=offline ..."
    )

    def __post_init__(self) -> None:
        check_fields(self, "run")
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

    def __post_init__(self) -> None:
        if self.data.batch_size % self.optimizer.accumulation_steps:
            raise UserError(
                f"optimizer.accumulation_steps: {self.optimizer.accumulation_steps} does not divide "
                f"data.batch_size={self.data.batch_size}"
            )
        wanted = {"one_per_cent": "learned_sink", "transplant": "null_key_value"}.get(self.run.init_null)
        if wanted and self.model.normalizer != wanted:
            raise UserError(
                f"run.init_null: {self.run.init_null} goes with model.normalizer={wanted}, got {self.model.normalizer}"
            )
        if wanted and not self.run.init_from:
            raise UserError(
                f"run.init_null: {self.run.init_null} needs a model to start from; name it in run.init_from"
            )
        if self.run.init_null == "transplant" and self.data.begin_token:
            raise UserError(
                "data.begin_token: with run.init_null=transplant the null is the begin token; set it to false"
            )
        if self.optimizer.null_value_fade_steps and self.model.normalizer != "null_key_value":
            raise UserError(
                "optimizer.null_value_fade_steps: goes with model.normalizer=null_key_value, got "
                f"{self.model.normalizer}"
            )
        if (self.data.corpus == "trigger") != (self.model.inputs == "vectors"):
            needed = "vectors" if self.data.corpus == "trigger" else "tokens"
            raise UserError(f"model.inputs: corpus={self.data.corpus} needs inputs={needed}, got {self.model.inputs}")


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain nested dicts, as it is written into checkpoints."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Mapping[str, Any]], written_by: str = "") -> Config:
    """The inverse of `to_dict`, which may have been through JSON.

    Args:
      values: nested dicts.
      written_by: the version of oasis_jax that wrote them, for the message.

    Raises:
      UserError: a field this version does not know.
    """
    suffix = _written_by(written_by)
    found = {}
    for section, cls in sections().items():
        given = dict(values[section])
        if "rules" in given:
            given["rules"] = tuple((name, tuple(axes)) for name, axes in given["rules"])
        found[section] = (
            model_from_dict(given, written_by) if section == "model" else build(cls, given, section, suffix)
        )
    return Config(**found)


def model_from_dict(values: Mapping[str, Any], written_by: str = "") -> ModelConfig:
    """The ModelConfig of nested dicts as `dataclasses.asdict` makes them; see `from_dict`."""
    suffix, given = _written_by(written_by), dict(values)
    if given.get("layer_pattern"):
        given["layer_pattern"] = tuple(
            build(LayerPattern, entry, "model.layer_pattern", suffix) for entry in given["layer_pattern"]
        )
    if given.get("rope_scaling"):
        given["rope_scaling"] = build(RopeScaling, given["rope_scaling"], "model.rope_scaling", suffix)
    return build(ModelConfig, given, "model", suffix)


def _written_by(version: str) -> str:
    return f"; the config was written by oasis_jax {version}" if version else ""
