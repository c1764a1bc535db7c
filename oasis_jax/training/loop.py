"""The training loop, from a config to a trained workdir."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from oasis_jax.config import Config, ModelConfig, RunConfig
from oasis_jax.data import Corpus, eval_batches, load_corpus, train_batches
from oasis_jax.errors import Preempted, UserError
from oasis_jax.model.batch import check_ids
from oasis_jax.placement import Placement, check_batch_size, make_mesh, place
from oasis_jax.storage import Mirror, Path
from oasis_jax.training.checkpoints import Checkpoints, Keep, Resumed
from oasis_jax.training.description import check_corpus, describe
from oasis_jax.training.distributed import batch_part, is_first
from oasis_jax.training.flops import peak_flops, training_flops
from oasis_jax.training.guard import Guard, TrainingStopped, floats
from oasis_jax.training.limits import check_limits, out_of_memory_in_words
from oasis_jax.training.lock import WorkdirLock
from oasis_jax.training.manifest import NAME as LIST_OF_FILES
from oasis_jax.training.metrics import MetricsWriter, NoWriter, ProgressBar, Speed, read_metrics
from oasis_jax.training.optimizer import at_step
from oasis_jax.training.preemption import Preemption
from oasis_jax.training.profiling import Profile
from oasis_jax.training.state import TrainState, new_state
from oasis_jax.training.step import make_step, make_telemetry
from oasis_jax.training.warm_start import starting_parameters, starting_point, with_source
from oasis_jax.training.workdir import is_copied, writable

# (parameters, model config, placement, held-out batches) -> {name: value}
Evaluator = Callable[[dict[str, Any], ModelConfig, Placement, Sequence[Mapping[str, Any]]], Mapping[str, object]]


__all__ = ["TrainingStopped", "fit"]


class _Run(NamedTuple):
    """What the steps of a run need."""

    config: Config
    mesh: jax.sharding.Mesh
    corpus: Corpus
    checkpoints: Checkpoints
    progress: ProgressBar
    preemption: Preemption
    lock: WorkdirLock
    mirror: Mirror | None  # of a workdir that is copied to where it belongs
    evaluators: Mapping[str, Evaluator]


def fit(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    evaluators: Mapping[str, Evaluator] | None = None,
    profile: tuple[int, int] | None = None,
    on_start: Callable[[dict], None] | None = None,
) -> dict[str, float]:
    """Trains a model; a workdir with checkpoints is resumed, and gives bitwise the losses of a run that was never
    stopped.

    Args:
      config: the run.
      workdir: gets metrics.jsonl, checkpoints/ and, where asked for, tensorboard/ and wandb/; a folder,
        gs://BUCKET/NAME or s3://BUCKET/NAME. To s3:// one process writes, and training waits until a checkpoint is
        there.
      evaluators: each run(params, model config, placement, held-out batches) -> {name: value}, called every
        run.eval_interval steps on the parameters where they lie; finite numbers among the values are logged as
        "eval/<name>".
      profile: (first, end): a trace of steps first .. end - 1 is written to workdir/profile.
      on_start: called with the parameters that the first step starts from, stacked; not when a run is resumed.

    Returns:
      The last line of metrics.jsonl.

    Raises:
      UserError: something the user can mend: config, mesh, data, another run's workdir, a workdir that cannot be
        written or that another process trains in.
      TrainingStopped: loss, gradient or parameters are no longer finite (such a state is never saved), or the workdir
        cannot take more.
      Preempted: SIGTERM came; the step it fell into was finished and saved. While the first step is still being
        compiled there is nothing to save, and the run ends at once.
    """
    config = with_source(config, workdir)
    mesh = make_mesh(config.mesh)
    # A batch that cannot be split and what cannot fit are refused before anything is read or written.
    check_batch_size(config, Placement(mesh, config.mesh.rules))
    check_limits(config, mesh)
    home = writable(workdir, config.run, profile=profile is not None)
    tokens = config.data.batch_size * config.data.sequence_length
    with contextlib.ExitStack() as stack:
        # Where the run stands. Nothing is changed before the workdir's run is known to be this one.
        stack.enter_context(out_of_memory_in_words())
        preemption = stack.enter_context(Preemption())
        progress = ProgressBar(steps=config.run.steps, tokens_per_step=tokens, silent=not is_first())
        lock = stack.enter_context(WorkdirLock(home, progress.say))
        mirror = Mirror(home, "--workdir", last=(LIST_OF_FILES,)) if is_copied(home) else None
        workdir = mirror.folder if mirror else home
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=Keep.of(config.run), say=progress.say))
        resumed = checkpoints.resume(config, mesh)
        warm = config.run.init_from and not resumed
        start = stack.enter_context(starting_point(config, progress.say)) if warm else None
        origin = resumed or start
        corpus = load_corpus(config.data, seed=config.run.seed, tokenizer=origin and origin.tokenizer)
        if resumed:
            check_corpus(corpus, resumed.corpus_identity)
        config = with_sizes(config, corpus)
        for note in corpus.notes:
            progress.say(note)
        if resumed and resumed.step == config.run.steps:
            progress.say(f"{home} has all its {resumed.step} steps; for more: --set run.steps=N")
            return _last_line(workdir)
        state = resumed.state if resumed else new_state(config, mesh, preemption.compiled)
        if start:
            examples = lambda rows: training_examples(corpus, config, rows)
            state = state._replace(params=starting_parameters(start, config, state.params, examples, progress.say))
        if on_start and not resumed:
            on_start(state.params)
        run = _Run(config, mesh, corpus, checkpoints, progress, preemption, lock, mirror, evaluators or {})
        _log_and_train(run, workdir, state, resumed, profile, stack)
    return _last_line(workdir)


def training_examples(corpus: Corpus, config: Config, rows: int) -> dict[str, np.ndarray]:
    """So many training examples, spread over the corpus, the same in every process; repeated where there are fewer."""
    found = eval_batches(corpus.train, dataclasses.replace(config.data, batch_size=rows), num_batches=1)[0]
    return {name: x[np.arange(rows) % len(x)] for name, x in found.items()}


def _log_and_train(
    run: _Run,
    workdir: Path,
    state: TrainState,
    resumed: Resumed | None,
    profile: tuple[int, int] | None,
    stack: contextlib.ExitStack,
) -> None:
    """Opens the examples and the logs where the run stands, and trains."""
    config, first = run.config, resumed.step if resumed else 0
    sharding = Placement(run.mesh, config.mesh.rules).sharding(("batch",))
    part, parts = batch_part(sharding, config.data.batch_size)
    batches = train_batches(run.corpus.train, config.data, seed=config.run.seed, part=part, parts=parts)
    stack.enter_context(contextlib.closing(batches))
    if resumed:
        batches.set_state(resumed.data_state)
    trackers = dict(tensorboard=config.run.tensorboard, wandb=config if config.run.wandb else None)
    logs = dict(step=first, check=run.lock.check, **trackers)
    writer = stack.enter_context(MetricsWriter(workdir, **logs) if is_first() else NoWriter())
    tracer = stack.enter_context(Profile(workdir, profile if is_first() else None))
    stack.enter_context(run.progress)
    run.progress.say(_header(config, state.params, run.mesh, first))
    _train(run, state, batches, parts, first, writer, tracer)


def _train(
    run: _Run,
    state: TrainState,
    batches: Iterator[Mapping],
    parts: int,
    first: int,
    writer: MetricsWriter,
    tracer: Profile,
) -> None:
    """The steps after `first`. The device is only waited for where something is read."""
    config, mesh, checkpoints = run.config, run.mesh, run.checkpoints
    guard, placement = Guard(config.optimizer, checkpoints), place(config, mesh)
    train_step, telemetry = make_step(config, mesh), make_telemetry(config, mesh)
    description = describe(config, run.corpus)
    heldout = _heldout(run)
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    speed = Speed(
        config.data.batch_size * config.data.sequence_length,
        flops_per_token=training_flops(config.model, config.data.sequence_length),
        peak_flops=peak and peak * mesh.size,
    )
    pending = {}
    for step in range(first + 1, config.run.steps + 1):
        due = _due(step, config.run, run.evaluators, leave=run.preemption.due(step))

        # One step, and before it a look at the parameters that it starts from.
        tracer.step(step, pending)
        with speed.spending("data"):
            examples = next(batches)
            check_ids(config.model, inputs=examples["inputs"], targets=examples["targets"])
        with speed.spending("transfer"):
            batch = placement.put(examples, parts=parts)
        if step == first + 1:
            train_step = run.preemption.compiled(partial(train_step.lower, state, batch))
        seen = {}
        if due.telemetry:
            seen = floats(telemetry(state, batch))
            speed.restart(step - 1)
        state, pending[step] = train_step(state, batch)
        # Few steps are on their way at a time: with several devices, more than they have threads would deadlock.
        jax.block_until_ready(pending.get(step - 2))

        # What was left on the device is looked at before it is logged or saved.
        if due.log or due.save:
            run.lock.check()
            with speed.spending("device"):
                values = guard.fetch(pending)
            pending = {}
        if due.log:
            values |= speed.read(step) | seen
            if due.evaluate:
                values |= _evaluate(run, at_step(config, step).model, state.params, placement, heldout)
            writer.write(step, values)
            run.progress.update(step, values)

        # After the log: the steps that a checkpoint has behind it are all in there.
        if due.save:
            data_state, loss = batches.get_state(), values.get("eval/loss")
            facts = dict(description=description, loss=loss, skipped=guard.skipping)
            _save(run, writer, state, step=step, data_state=data_state, **facts)
        if due.leave and step < config.run.steps:
            checkpoints.wait()
            raise Preempted(
                f"step {step}: told to end (SIGTERM), saved in {checkpoints.folder}; the same command resumes"
            )
        if due.evaluate or due.save or step == first + 1:
            speed.restart(step)


def _save(run: _Run, writer: MetricsWriter, state: TrainState, **facts) -> None:
    """See `Checkpoints.save`; where a run is copied to a store, returns when the checkpoint is there."""
    writer.sync()
    run.checkpoints.save(state, **facts)
    if run.mirror:
        run.checkpoints.wait()
        run.lock.check()
        run.mirror.upload()


def _heldout(run: _Run) -> list[Mapping]:
    config = run.config
    if not run.evaluators or not config.run.eval_interval:
        return []
    return list(eval_batches(run.corpus.heldout, config.data, num_batches=config.run.eval_batches))


class _Due(NamedTuple):
    """What a step does beside training."""

    telemetry: bool
    evaluate: bool
    save: bool
    log: bool
    leave: bool


def _due(step: int, run: RunConfig, evaluators: Mapping[str, Evaluator], leave: bool) -> _Due:
    """What the intervals of a run ask for at a step; 0 is never. The last step is logged and saved, and so is one to
    leave after.
    """

    def at(interval: int) -> bool:
        return interval > 0 and step % interval == 0

    last = leave or step == run.steps
    look, evaluate = at(run.telemetry_interval), bool(evaluators) and at(run.eval_interval)
    return _Due(
        look, evaluate, last or at(run.checkpoint_interval), last or look or evaluate or at(run.log_interval), leave
    )


def with_sizes(config: Config, corpus: Corpus) -> Config:
    """The config with the vocabulary or vector size that the data has; raises UserError where it asks for another."""
    if corpus.tokenizer:
        name, size, what = "vocab_size", corpus.tokenizer.vocab_size, f"{corpus.tokenizer.kind} tokenizer"
    else:
        name, size, what = "vector_dim", corpus.vector_dim, f"corpus {config.data.corpus}"
    asked = getattr(config.model, name)
    if corpus.tokenizer and corpus.tokenizer.kind == "library" and asked >= size:
        size = asked  # a pretrained model may have more rows than its tokenizer has tokens
    if asked not in (0, size):
        raise UserError(f"model.{name}: {asked} asked for, but the {what} has {size}; leave it at 0")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: size}))


def _last_line(workdir: Path) -> dict[str, float]:
    return (read_metrics(workdir) or [{}])[-1]


def _evaluate(
    run: _Run, model: ModelConfig, params: dict, placement: Placement, batches: Sequence[Mapping]
) -> dict[str, float]:
    found = {}
    for evaluator in run.evaluators.values():
        found |= evaluator(params, model, placement, batches)
    return {
        f"eval/{name}": float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _header(config: Config, params: dict, mesh: jax.sharding.Mesh, first: int) -> str:
    """What is trained on what, in a line."""
    count = sum(x.size for x in jax.tree.leaves(params))
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    devices = f"{mesh.size} of {len(jax.devices())} {jax.default_backend()} devices"
    start = f"resumed at step {first}" if first else "from the start"
    return f"{config.model.preset}: {count:,} parameters on {devices} ({axes}), {start}"
