"""What a report measures: a model where it lies, and the sequences it reads."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from oasis_jax.config import Config, DataConfig, MeshConfig
from oasis_jax.data import Tokenizer, eval_batches, files, load_corpus, stdlib
from oasis_jax.data.text import TextFile, digest, token_stream
from oasis_jax.errors import UserError, printable
from oasis_jax.evaluation import stored_paths
from oasis_jax.evaluation.evaluator import Batch
from oasis_jax.model.decoder import check_model
from oasis_jax.placement import Placement
from oasis_jax.pretrained import Pretrained, load_pretrained
from oasis_jax.pretrained.rotation import check_rotation, rotate
from oasis_jax.pretrained.transplant import check_transplant, find_prefix, transplant_sink
from oasis_jax.training.description import check_corpus, versions
from oasis_jax.training.distributed import is_first
from oasis_jax.training.load import LoadedRun
from oasis_jax.training.metrics import read_metrics


class Subject(NamedTuple):
    """One column of a report.

    Attributes:
      source: the workdir, folder or file it comes from.
      label: short and unique among the subjects of a report.
      notes: in words, what was done to it and how its texts begin.
      params, config, placement: see `oasis_jax.evaluation.evaluate`; of config the data section says what was read.
      batches: measured.
      calibration: further batches of the same shape, from which quantization takes ranges.
      corpus: identity of the text.
    """

    source: str
    label: str
    notes: tuple[str, ...]
    step: int
    params: Any
    config: Config
    placement: Placement
    tokenizer: Tokenizer | None
    begin_token: bool
    batches: list[Batch]
    calibration: Callable[[], list[Batch]]
    corpus: dict
    history: list[dict]
    versions: dict[str, str]


def subject_of_run(
    run: LoadedRun, workdir: str, label: str, num_batches: int | None, pattern: str | None = None
) -> Subject:
    """A trained run on its own held-out data; calibrated on as many batches of training data.

    Args:
      pattern: where its data lie; None: where its checkpoint says, see `oasis_jax.evaluation.stored_paths`.

    Raises:
      UserError: the corpus is not there any more, or another, or its checkpoint says a path that is not opened unasked.
    """
    data = run.config.data if pattern is None else dataclasses.replace(run.config.data, pattern=pattern)
    try:
        if pattern is None:
            stored_paths.check_stored(data, workdir)
            if data.pattern and is_first():
                where = f"{label}: its text is read from {data.pattern!r}, as its checkpoint says"
                print(printable(where), file=sys.stderr)
        if data.corpus in ("files", "pairs"):
            found = files.matching_files(data.pattern)
            stored_paths.check_found(found, workdir, run.corpus_identity.get("bytes"))
        corpus = load_corpus(data, seed=run.config.run.seed, tokenizer=run.tokenizer)
        check_corpus(corpus, run.corpus_identity)
    except UserError as error:
        raise UserError(f"{workdir}: {error}") from None
    batches = eval_batches(corpus.heldout, data, num_batches=num_batches or run.config.run.eval_batches)
    return Subject(
        source=str(workdir),
        label=label,
        notes=(),
        step=run.step,
        params=run.params,
        config=dataclasses.replace(run.config, data=data),
        placement=run.placement,
        tokenizer=run.tokenizer,
        begin_token=run.tokenizer is not None and data.begin_token,
        batches=[with_bytes(batch, run.tokenizer) for batch in batches],
        calibration=lambda: eval_batches(corpus.train, data, num_batches=len(batches)),
        corpus=run.corpus_identity,
        history=read_metrics(workdir),
        versions=run.versions,
    )


def with_bytes(batch: Batch, tokenizer: Tokenizer | None) -> Batch:
    """A batch that also says how many bytes of text each target stands for: "bytes" [B, T]."""
    return batch if tokenizer is None else {**batch, "bytes": tokenizer.byte_lengths[batch["targets"]]}


class ModelOptions(NamedTuple):
    """How pretrained models are measured.

    Attributes:
      text: "stdlib", or a file or glob of .txt and .jsonl files.
      length: tokens T of a sequence, a begin token not counted.
      num_batches, batch_size: how many sequences are read.
      begin_token: "auto": as the model's texts begin; "none"; or the number of a token.
      dtype: of parameters and computations.
      mesh: how a model is split over devices; None: on one.
      computed: fields of ModelConfig that say how it is computed, such as attention_implementation.
      transplant: "": not; "begin", "auto" (see `find_prefix`), or numbers of tokens with commas between: the model is
        measured with its sink transplanted, too.
      rotate: the model is measured with its stream rotated, too, and with both.
    """

    text: str = "stdlib"
    length: int = 512
    num_batches: int = 8
    batch_size: int = 8
    begin_token: str = "auto"
    dtype: str = "float32"
    mesh: MeshConfig | None = None
    computed: Mapping[str, Any] = MappingProxyType({})
    transplant: str = ""
    rotate: bool = False


def subjects_of_model(source: str, label: str, options: ModelOptions) -> Iterator[Subject]:
    """A pretrained model as it is and, as asked for, transplanted, rotated, and both; made one after the other. All
    read the same tokens of the same text.

    Raises:
      UserError: see `load_pretrained`, `transplant_sink` and `rotate`; a text too short, or longer than the model's
        context.
    """
    model = _opened(source, options)
    for wanted, check in ((options.transplant, check_transplant), (options.rotate, check_rotation)):
        if wanted:
            check(model.config)  # before anything is measured
    text = _Text(model.tokenizer, options)
    prefix = _prefix(model, options.transplant, text) if options.transplant else None
    yield text.subject(model, source, label)
    if prefix is not None:
        yield text.subject(transplant_sink(model, prefix), source, f"{label}, transplanted")
    if options.rotate:
        turned = rotate(model)
        yield text.subject(turned, source, f"{label}, rotated")
        if prefix is not None:
            yield text.subject(transplant_sink(turned, prefix), source, f"{label}, both")


def _opened(source: str, options: ModelOptions) -> Pretrained:
    """The model as the options have it, which can read what they ask for."""
    model = load_pretrained(source, dtype=options.dtype, mesh=options.mesh)
    if model.tokenizer is None:
        raise UserError(f"{source}: has no tokenizer.json, which reading text needs")
    config = dataclasses.replace(model.config, **options.computed)
    check_model(config)
    model = model.replace(config=config, begin_token=begin_token(model, options.begin_token))
    context, asked = model.config.context_length, options.length + (model.begin_token is not None)
    if context and asked > context:
        raise UserError(f"--length: {asked} tokens, the begin token included, but {source} was made for {context}")
    return model


def subject_of_form(
    source: str,
    label: str,
    options: ModelOptions,
    make: Callable[[Pretrained, Int[np.ndarray, "C T"]], Pretrained],
    part: tuple[int, int],
) -> Subject:
    """A pretrained model after something was done to it, on every n-th sequence of a text.

    Args:
      options: of how it is loaded and of all n parts of the text together.
      make: (the model as it is, rows of calibration text) -> the model to be measured.
      part: (the first sequence, n).

    Raises:
      UserError: see `load_pretrained`; a text too short, or longer than the model's context.
    """
    model = _opened(source, options)
    text = _Text(model.tokenizer, options)
    first, step = part
    text.measured = text.measured[first::step]
    return text.subject(make(model, text.calibration[:, :-1]), source, label)


def begin_token(model: Pretrained, asked: str) -> int | None:
    """The token that texts begin with, as --begin-token says: auto, the model's own; none; or its number."""
    if asked in ("auto", "none"):
        return model.begin_token if asked == "auto" else None
    return _token(model, asked, "--begin-token: must be auto, none or the number of a token")


def _token(model: Pretrained, text: str, what: str) -> int:
    size = model.config.vocab_size
    if not text.isdecimal() or int(text) >= size:
        raise UserError(f"{what} below {size}, got {text!r}")
    return int(text)


def _prefix(model: Pretrained, asked: str, text: "_Text") -> list[int]:
    if asked == "begin":
        if model.begin_token is None:
            raise UserError("--transplant: the texts of this model have no begin token; name one with --begin-token")
        return [model.begin_token]
    if asked == "auto":
        return find_prefix(model, text.calibration[:, :-1])
    what = "--transplant: must be begin, auto, or numbers of tokens with commas between"
    return [_token(model, part.strip(), what) for part in asked.split(",")]


class _Text:
    """A text as one model's tokenizer reads it: windows of T + 1 tokens, spread evenly, none of which overlap."""

    def __init__(self, tokenizer: Tokenizer, options: ModelOptions):
        found = _text_files(options.text)
        tokens = token_stream([document for file in found for document in file.documents], tokenizer)
        size, wanted = options.length + 1, options.num_batches * options.batch_size
        windows = tokens[: len(tokens) // size * size].reshape(-1, size).astype(np.int32)
        calibrating = max(wanted // 8, 1)
        if len(windows) < wanted + calibrating:
            raise UserError(
                f"--text: {options.text!r} holds {len(tokens)} tokens, {len(windows)} sequences of {size}; "
                f"{wanted} to measure and {calibrating} to calibrate are asked for: take fewer --batches or a smaller "
                "--length"
            )
        chosen = np.linspace(0, len(windows) - 1, wanted + calibrating).astype(int)
        held = np.linspace(0, len(chosen) - 1, calibrating + 2).astype(int)[1:-1]
        self.measured: Int[np.ndarray, "S t"] = windows[np.delete(chosen, held)]
        self.calibration: Int[np.ndarray, "C t"] = windows[chosen[held]]
        self.tokenizer, self.options = tokenizer, options
        self.corpus = {"name": options.text, "sha256": digest(found), "files": len(found)}

    def batches(self, rows: Int[np.ndarray, "S t"], begin: int | None) -> list[Batch]:
        """Batches whose targets t_1 .. t_T are scored. A begin token comes before t_0, which it predicts; that is not
        scored, so that the same tokens count with and without one.
        """
        weights = np.ones((len(rows), rows.shape[1] - 1), np.float32)
        if begin is not None:
            rows = np.insert(rows, 0, begin, axis=1)
            weights = np.insert(weights, 0, 0.0, axis=1)
        arrays = {"inputs": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}
        size = self.options.batch_size
        parts = range(0, len(rows), size)
        return [{name: np.ascontiguousarray(x[i : i + size]) for name, x in arrays.items()} for i in parts]

    def subject(self, model: Pretrained, source: str, label: str) -> Subject:
        """The model on this text."""
        begin, options = model.begin_token, self.options
        changes = tuple(model.card.get("changes", ()))
        how = f"a begin token, {begin}" if begin is not None else "no begin token"
        data = DataConfig(
            corpus="stdlib" if options.text == "stdlib" else "files",
            pattern="" if options.text == "stdlib" else options.text,
            sequence_length=options.length,
            batch_size=options.batch_size,
            begin_token=begin is not None,
        )
        config = Config(model=model.config, data=data, mesh=options.mesh or MeshConfig())
        return Subject(
            source=source,
            label=label,
            notes=(*changes, f"texts begin with {how}"),
            step=model.card.get("step", 0),
            params=model.params,
            config=config,
            placement=model.placement,
            tokenizer=self.tokenizer,
            begin_token=begin is not None,
            batches=[with_bytes(batch, self.tokenizer) for batch in self.batches(self.measured, begin)],
            calibration=lambda: self.batches(self.calibration, begin),
            corpus=self.corpus,
            history=[],
            versions=versions(),
        )


def calibration_batches(model: Pretrained, text: str = "stdlib", *, sequences: int = 8) -> list[Batch]:
    """Text from which quantization takes ranges where nothing is measured: sequences of up to 512 tokens.

    Args:
      text: see `ModelOptions`.

    Raises:
      UserError: a model without a tokenizer, a text too short.
    """
    if model.tokenizer is None:
        raise UserError("calibration: text needs a tokenizer, and this model came without one")
    length = min(512, (model.config.context_length or 513) - 1)
    found = _Text(model.tokenizer, ModelOptions(text=text, length=length, num_batches=sequences, batch_size=1))
    return found.batches(found.measured, model.begin_token)


def _text_files(text: str) -> Sequence[TextFile]:
    if text == "stdlib":
        return stdlib.read_files()
    try:
        return files.read_files(DataConfig(corpus="files", pattern=text))[0]
    except UserError as error:
        raise UserError(str(error).replace("data.pattern", "--text")) from None
