"""Steps that are not finite, notices to end, and which checkpoints stay."""

import dataclasses
import math
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.errors import Preempted, UserError
from oasis_jax.placement import Placement
from oasis_jax.training import loop
from oasis_jax.training.checkpoints import Checkpoints
from oasis_jax.training.distributed import Processes, batch_part
from oasis_jax.training.keep import Keep
from oasis_jax.training.metrics import read_metrics
from oasis_jax.training.preemption import Preemption

CONFIG = Config(
    model=ModelConfig(preset="oasis", inputs="vectors", num_layers=1, width=14, num_heads=1, mlp_dim=22),
    data=DataConfig(corpus="trigger", sequence_length=9, batch_size=5, trigger_dim=4),
    optimizer=OptimizerConfig(warmup_steps=3, schedule="constant"),
    run=RunConfig(steps=30, checkpoint_interval=7, telemetry_interval=0),
)


def with_fields(**sections):
    return dataclasses.replace(
        CONFIG, **{name: dataclasses.replace(getattr(CONFIG, name), **fields) for name, fields in sections.items()}
    )


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the targets of these steps become NaN."""

    def use(steps):
        put, calls = Placement.put, []

        def poisoned(placement, batch, **options):
            calls.append(None)
            if len(calls) in steps:
                batch = batch | {"targets": batch["targets"] * np.float32("nan")}
            return put(placement, batch, **options)

        monkeypatch.setattr(Placement, "put", poisoned)

    return use


def test_a_loss_that_is_not_finite_stops_the_run(poison, tmp_path):
    poison({17})
    with pytest.raises(
        loop.TrainingStopped, match=r"step 17: the loss is not finite .* the last good checkpoint is step 14"
    ):
        loop.fit(CONFIG, tmp_path)


def test_a_skipped_step_changes_nothing_and_is_counted(poison, tmp_path):
    poison({17})
    last = loop.fit(with_fields(optimizer=dict(nonfinite="skip")), tmp_path)
    lines = read_metrics(tmp_path)
    assert last["step"] == 30 and [line["step"] for line in lines if line["skipped"]] == [17]
    assert "loss" not in lines[16] and all(math.isfinite(line["loss"]) for line in lines if line["step"] != 17)


@pytest.mark.slow
def test_a_run_that_skips_nothing_is_the_one_that_would_stop(tmp_path):
    losses = []
    for policy in ("stop", "skip"):
        loop.fit(with_fields(optimizer=dict(nonfinite=policy)), tmp_path / policy)
        losses.append([line["loss"] for line in read_metrics(tmp_path / policy)])
    np.testing.assert_allclose(*losses, rtol=1e-4)  # two programs: the last bits differ


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run that skips step 2 and is lost from step 5 on, while an evaluator still finds low losses; its message and
    its workdir.
    """
    workdir = tmp_path_factory.mktemp("diverged")
    run = dict(checkpoint_interval=1, eval_interval=1, keep_checkpoints=1, keep_best=1)
    config = with_fields(run=run, optimizer=dict(nonfinite="skip", nonfinite_limit=4))
    losses = iter([0.5, 0.1, 0.2, 0.4, *[0.1] * 9])
    put, calls = Placement.put, []

    def poisoned(placement, batch, **options):
        calls.append(None)
        scale = np.float32("nan" if len(calls) == 2 or len(calls) > 4 else 1)
        return put(placement, batch | {"targets": batch["targets"] * scale}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "put", poisoned)
        with pytest.raises(loop.TrainingStopped) as error:
            loop.fit(config, workdir, evaluators={"own": lambda *_: {"loss": next(losses)}})
    return str(error.value), workdir


def test_skipped_steps_push_out_no_good_checkpoint(diverged):
    message, workdir = diverged
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {3, 4, 7}  # best, newest good, newest
    assert message.startswith("step 8: 4 steps in a row were not finite")
    assert "the last good checkpoint is step 4" in message


def test_a_resumed_run_knows_which_were_good(diverged):
    with Checkpoints(diverged[1], keep=Keep(1, best=1), say=print) as checkpoints:
        config = with_fields(optimizer=dict(nonfinite="skip"))
        assert checkpoints.resume(config, loop.make_mesh(config.mesh)).step == 7
        assert checkpoints.last_good().startswith("the last good checkpoint is step 4")


class Lowered:
    """What compiles for ever."""

    def compile(self):
        threading.Event().wait()


def trace_for_ever():
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("lower, compiling", [(Lowered, True), (trace_for_ever, False)])
def test_sigterm_waits_for_no_compiler(lower, compiling):
    with Preemption() as preemption:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Preempted, match=r"told to end \(SIGTERM\) before .* nothing to save") as notice:
            preemption.compiled(lower)
        assert notice.value.compiling == compiling
        with pytest.raises(Preempted) as notice:
            preemption.compiled(lower)
        assert not notice.value.compiling


def test_what_a_compiler_raises_reaches_the_run():
    class Broken:
        def compile(self):
            raise MemoryError("no room")

    with Preemption() as preemption, pytest.raises(MemoryError, match="no room"):
        preemption.compiled(Broken)


def test_sigterm_saves_and_a_second_call_goes_on(tmp_path, monkeypatch):
    undisturbed = loop.fit(CONFIG, tmp_path / "undisturbed")
    put, calls = Placement.put, []

    def signalled(placement, batch, **options):
        calls.append(None)
        if len(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(placement, batch, **options)

    monkeypatch.setattr(Placement, "put", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"step 1[12]: told to end \(SIGTERM\), saved in"):
        loop.fit(CONFIG, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before
    assert loop.fit(CONFIG, tmp_path / "run")["loss"] == undisturbed["loss"]


def test_which_checkpoints_stay(tmp_path):
    losses = iter([0.5, 0.2, 0.9, 0.4, 0.7, 0.6])
    config = with_fields(
        run=dict(checkpoint_interval=5, eval_interval=5, keep_checkpoints=1, keep_every=15, keep_best=1)
    )
    loop.fit(config, tmp_path, evaluators={"own": lambda *_: {"loss": next(losses)}})
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [
        10,
        15,
        30,
    ]  # best, every 15, newest and every 15


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(keep_every=20, checkpoint_interval=15), "run.keep_every: 20 is not a multiple of checkpoint_interval=15"),
        (dict(keep_best=1), "eval_interval=0 does not divide checkpoint_interval=100"),
        (dict(keep_best=1, eval_interval=30), "eval_interval=30 does not divide checkpoint_interval=100"),
    ],
)
def test_policies_that_cannot_work_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        RunConfig(**fields)


@pytest.mark.parametrize(
    "values, message",
    [(("host", 2, 0), "expected HOST:PORT"), (("host:1", 2, 2), "between 0 and 1"), (("host:1", 0, 0), "at least 1")],
)
def test_processes_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Processes(*values)


class _Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    "split, parts, index",
    [
        ([0, 0, 1, 1], 2, 0),  # both processes have half of the examples
        ([0, 1, 0, 1], 1, 0),  # model parallelism across processes: each holds all
        ([1, 1, 0, 0], 2, 1),
    ],
)
def test_the_part_of_a_batch_that_a_process_reads(split, parts, index):
    class Sharding:
        def devices_indices_map(self, shape):
            half = shape[0] // 2
            return {
                _Device(process): (slice(0, half) if i < 2 else slice(half, None),) for i, process in enumerate(split)
            }

    assert batch_part(Sharding(), 12) == (index, parts)


def test_one_process_reads_all():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    assert batch_part(NamedSharding(mesh, PartitionSpec("data")), 6) == (0, 1)
