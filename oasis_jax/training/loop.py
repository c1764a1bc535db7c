"""The training loop, from a config to a trained workdir."""

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence

import jax

from oasis_jax.config import Config
from oasis_jax.data import Corpus, eval_batches, load_corpus, train_batches
from oasis_jax.decoder import Decoder
from oasis_jax.errors import UserError
from oasis_jax.training.checkpoints import Checkpoints, check_corpus, describe
from oasis_jax.training.metrics import MetricsWriter, ProgressBar, Speed, read_metrics
from oasis_jax.training.sharding import batch_sharding, make_mesh, put_batch
from oasis_jax.training.state import build_model, new_state
from oasis_jax.training.step import make_step, make_telemetry

Evaluator = Callable[[Decoder, Sequence[Mapping]], Mapping[str, object]]


class TrainingStopped(UserError):
    """Training went astray at a step; the workdir holds what was good before."""


def fit(config: Config, workdir: str | os.PathLike, *, evaluators: Mapping[str, Evaluator] | None = None) -> dict[str, float]:
    """Trains a model; a workdir with checkpoints is resumed, and gives bitwise the losses of a run that was never stopped.

    Args:
      config: the run.
      workdir: gets metrics.jsonl, checkpoints/ and, where asked for, tensorboard/.
      evaluators: each run(model, held-out batches) -> {name: value}, called every run.eval_interval steps; numbers among the
        values are logged as "eval/<name>".

    Returns:
      The last line of metrics.jsonl.

    Raises:
      UserError: something the user can mend: config, mesh, data, another run's workdir, a workdir that cannot be written.
      TrainingStopped: loss, gradient or parameters are no longer finite; such a state is never saved.
    """
    mesh = make_mesh(config.mesh)
    sharding = batch_sharding(config, mesh)
    workdir = writable(workdir)
    tokens = config.data.batch_size * config.data.sequence_length
    with contextlib.ExitStack() as stack:
        # Where the run stands: nothing is written before the config is known to be that of the workdir.
        progress = ProgressBar(steps=config.run.steps, tokens_per_step=tokens)
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.run.keep_checkpoints, say=progress.say))
        resumed = checkpoints.resume(config, mesh)
        corpus = load_corpus(config.data, seed=config.run.seed, tokenizer=resumed and resumed.tokenizer)
        if resumed:
            check_corpus(corpus, resumed.corpus_identity)
        config = with_sizes(config, corpus)
        description = describe(config, corpus)
        first = resumed.step if resumed else 0
        if first == config.run.steps:
            progress.say(f"{workdir} has all its {first} steps")
            return read_metrics(workdir)[-1]

        # State, data, compiled functions
        state = resumed.state if resumed else new_state(config, mesh)
        batches = stack.enter_context(contextlib.closing(train_batches(
            corpus.train, config.data, seed=config.run.seed, process_index=jax.process_index(), process_count=jax.process_count()
        )))  # fmt: skip
        if resumed:
            batches.set_state(resumed.data_state)
        heldout = eval_batches(corpus.heldout, config.data, num_batches=config.run.eval_batches) if evaluators else []
        train_step, telemetry = make_step(config, mesh), make_telemetry(config, mesh)

        # Logs
        writer = stack.enter_context(MetricsWriter(workdir, step=first, tensorboard=config.run.tensorboard))
        stack.enter_context(progress)
        progress.say(_header(config, state.params, mesh, first, tokens))
        speed, pending, values = Speed(tokens), {}, {}

        for step in range(first + 1, config.run.steps + 1):
            last = step == config.run.steps
            look = _due(step, config.run.telemetry_interval)
            evaluate = bool(evaluators) and _due(step, config.run.eval_interval)
            save = last or _due(step, config.run.checkpoint_interval)
            log = last or look or evaluate or _due(step, config.run.log_interval)

            # One step. The device is only waited for where something is read.
            batch = put_batch(next(batches), sharding)
            seen = telemetry(state.params, batch) if look else {}
            state, pending[step] = train_step(state, batch)

            if log or save:
                values = _fetch(pending, checkpoints)
                pending = {}
            if log:
                values |= speed.read(step) | _floats(seen)
                if evaluate:
                    values |= _evaluate(evaluators, build_model(config.model, state.params), heldout)
                writer.write(step, values)
                progress.update(step, values)
            if save:  # after the line is written: what a checkpoint has seen is logged
                checkpoints.save(state, step=step, data_state=batches.get_state(), description=description)
            if evaluate or save or look or step == first + 1:
                speed.restart(step)
    return read_metrics(workdir)[-1]


def writable(workdir: str | os.PathLike) -> pathlib.Path:
    """The folder, made where it is missing; raises UserError where it cannot be written."""
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {str(workdir)!r}: {error.strerror}") from None
    return workdir


def with_sizes(config: Config, corpus: Corpus) -> Config:
    """The config with the vocabulary or vector size that the data has; raises UserError where it asks for another."""
    if corpus.tokenizer:
        name, size, what = "vocab_size", corpus.tokenizer.vocab_size, f"{corpus.tokenizer.kind} tokenizer"
    else:
        name, size, what = "vector_dim", corpus.vector_dim, f"corpus {config.data.corpus}"
    asked = getattr(config.model, name)
    if asked not in (0, size):
        raise UserError(f"model.{name}: {asked} asked for, but the {what} has {size}; leave it at 0")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: size}))


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def _fetch(pending: dict[int, Mapping[str, jax.Array]], checkpoints: Checkpoints) -> dict[str, float]:
    """The newest of the metrics that were left on the device, after a look at all of them."""
    for step, metrics in pending.items():
        values = _floats(metrics)
        for name, cause in {"loss": "the loss", "grad_norm": "the gradient", "parameter_norm": "a parameter"}.items():
            if not math.isfinite(values[name]):
                good = checkpoints.steps()
                kept = f"the last good checkpoint is step {good[0]} in {checkpoints.folder}" if good else "there is no checkpoint yet"
                raise TrainingStopped(f"step {step}: {cause} is not finite ({name} = {values[name]}); stopped, {kept}")
    return values


def _evaluate(evaluators: Mapping[str, Evaluator], model: Decoder, batches: Sequence[Mapping]) -> dict[str, float]:
    found = {}
    for run in evaluators.values():
        found |= run(model, batches)
    return {f"eval/{name}": float(value) for name, value in found.items() if isinstance(value, int | float)}


def _header(config: Config, params: dict, mesh: jax.sharding.Mesh, first: int, tokens: int) -> str:
    """What is trained on what, in a line."""
    count = sum(x.size for x in jax.tree.leaves(params))
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    devices = f"{mesh.size} of {len(jax.devices())} {jax.default_backend()} devices"
    start = f"resumed at step {first}" if first else "from the start"
    return f"{config.model.preset}: {count:,} parameters on {devices} ({axes}), {tokens:,} tokens a step, {start}"
