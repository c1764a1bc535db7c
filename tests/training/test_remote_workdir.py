"""Runs whose workdir lies in an object store: one writer, whole checkpoints, metrics, whatever is killed when."""

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
from saved_runs import MESH, equal

from oasis_jax.config import OptimizerConfig, RunConfig
from oasis_jax.errors import UserError
from oasis_jax.storage import Mirror, as_path, listing, write_bytes
from oasis_jax.storage.paths import filesystem
from oasis_jax.training import manifest
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import describe
from oasis_jax.training.load import load_run
from oasis_jax.training.lock import NAME, WorkdirLock
from oasis_jax.training.loop import fit
from oasis_jax.training.metrics import MetricsWriter, read_metrics
from oasis_jax.training.workdir import readable, writable

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OASIS_JAX_CACHE", str(tmp_path / "cache"))


def elsewhere(workdir, **changes) -> None:
    """The lock of a process of another machine."""
    holder = {"host": "far", "machine": ["far", "other boot"], "token": "theirs", "pid": 3, "since": time.time()}
    write_bytes(workdir / NAME, json.dumps(holder | changes).encode())


def test_one_writer(bucket):
    workdir, said = as_path(f"{bucket}/lock", "--workdir"), []
    with WorkdirLock(workdir, print) as mine:
        with pytest.raises(UserError, match=f"'{bucket}/lock' is being trained in by process {os.getpid()} on"):
            WorkdirLock(workdir, print).__enter__()
        mine.check()
    assert listing(workdir) == {}
    elsewhere(workdir)
    toucher = threading.Timer(1.5, elsewhere, (workdir,))  # in another of the store's seconds
    toucher.start()
    with pytest.raises(UserError, match=r"is being trained in by process 3 on far"):
        WorkdirLock(workdir, print, heartbeat=0.2, stale=30).__enter__()
    toucher.join()
    with WorkdirLock(workdir, said.append, heartbeat=0.2, stale=2) as mine:  # nobody touches it any more
        assert json.loads((workdir / NAME).read_bytes())["pid"] == os.getpid()
        elsewhere(workdir)
        deadline = time.monotonic() + 20
        with pytest.raises(UserError, match="was taken over by another process"):
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.05)
    assert len(said) == 1 and "whether it lives" in said[0]
    assert json.loads((workdir / NAME).read_bytes())["token"] == "theirs"


def test_of_many_that_find_a_stale_lock_one_gets_it(bucket):
    workdir = as_path(f"{bucket}/stale", "--workdir")
    elsewhere(workdir)
    held, start = [], threading.Barrier(4)
    time.sleep(2.1)

    def attempt():
        start.wait()
        mine = WorkdirLock(workdir, lambda text: None, stale=1)
        with contextlib.suppress(UserError):
            held.append(mine.__enter__())

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].__exit__(None, None, None)
    assert listing(workdir) == {}


def test_metrics_are_there_before_a_checkpoint_and_at_the_end(bucket):
    workdir = as_path(f"{bucket}/metrics", "--workdir")
    with MetricsWriter(workdir, step=0, tensorboard=False) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(workdir) == []
        writer.sync()
        writer.write(2, {"loss": 1.0})
        assert [line["step"] for line in read_metrics(workdir)] == [1]
    assert [line["step"] for line in read_metrics(str(workdir))] == [1, 2]
    with MetricsWriter(workdir, step=1, tensorboard=False):
        pass
    assert [line["loss"] for line in read_metrics(workdir)] == [2.0]

    def taken():
        raise UserError("taken over")

    with pytest.raises(KeyError), MetricsWriter(workdir, step=1, tensorboard=False, check=taken) as writer:
        writer.write(2, {"loss": 0.5})
        raise KeyError
    assert [line["loss"] for line in read_metrics(workdir)] == [2.0]


def test_what_a_store_cannot_hold_is_refused(gs, s3, monkeypatch):
    with pytest.raises(UserError, match=r"run\.tensorboard: cannot be written to gs://"):
        writable(f"{gs}/run", RunConfig(tensorboard=True))
    for place in (gs, s3):
        with pytest.raises(UserError, match=r"run\.wandb: needs a folder beside the run"):
            writable(f"{place}/run", RunConfig(wandb=True))
    with pytest.raises(UserError, match="--profile: cannot be written to gs://"):
        writable(f"{gs}/run", RunConfig(), profile=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes cannot write one checkpoint to s3://"):
        writable(f"{s3}/run", RunConfig())


# Checkpoints that Orbax writes to gs:// itself


def save(workdir, run, steps, keep=None):
    _, config, corpus, states = run
    with Checkpoints(workdir, keep=keep or Keep(2), say=print) as checkpoints:
        for step in steps:
            facts = dict(data_state={"next_index": 5 * step}, description=describe(config, corpus))
            checkpoints.save(states[step], step=step, **facts)


def resume(workdir, run, said):
    with Checkpoints(workdir, keep=Keep(2), say=said.append) as checkpoints:
        return checkpoints.resume(run[0], MESH)


@pytest.fixture
def workdir(gs, run, request):
    found = as_path(f"{gs}/{request.node.name.partition('[')[0]}", "--workdir")
    save(found, run, (3, 6, 9))
    return found


def test_a_run_in_gs_is_saved_resumed_and_read(workdir, run):
    assert {name.partition("/")[0] for name in listing(workdir / "checkpoints")} == {"6", "9"}  # two are kept
    resumed = resume(workdir, run, said := [])
    assert said == [] and resumed.step == 9 and resumed.data_state == {"next_index": 45}
    assert equal(resumed.state, run[3][9])
    assert load_run(str(workdir), step=6).step == 6


def test_no_file_of_a_checkpoint_is_read_back_to_be_listed(workdir, run, monkeypatch):
    files = json.loads((workdir / "checkpoints" / "9" / manifest.NAME).read_bytes())["files"]
    found = listing(workdir / "checkpoints" / "9")
    assert {name: tuple(entry) for name, entry in files.items()} == {
        name: tuple(entry) for name, entry in found.items() if name != manifest.NAME
    }
    assert all(entry.checksum.startswith("crc32c:") for entry in found.values())


@pytest.mark.parametrize("harm", ["changed", "cut", "deleted", "added"])
def test_a_damaged_checkpoint_is_set_aside(gs, run, harm):
    workdir = as_path(f"{gs}/damaged/{harm}", "--workdir")
    save(workdir, run, (6, 9))
    folder = workdir / "checkpoints" / "9"
    name = next(name for name in sorted(listing(folder)) if name.startswith("rest/d/"))
    content = (folder / name).read_bytes()
    if harm == "deleted":
        (folder / name).unlink()
    elif harm == "added":
        write_bytes(folder / "more", b"more")
    else:
        write_bytes(folder / name, content[:-1] + (bytes([content[-1] ^ 1]) if harm == "changed" else b""))
    resumed = resume(workdir, run, said := [])
    assert resumed.step == 6 and equal(resumed.state, run[3][6])
    assert ("more" if harm == "added" else name) in said[0]
    assert said[1] == f"checkpoint 9 is set aside in {workdir / 'checkpoints_broken'}"
    assert listing(workdir / "checkpoints" / "9") == {} and listing(workdir / "checkpoints_broken" / "9")


KILLED = """
import os, pickle, signal, sys
import jax
from oasis_jax.training import checkpoints, manifest
from oasis_jax.storage import as_path
step, state, facts = pickle.load(sys.stdin.buffer)
# Arrays of JAX, as a run has them: without any the library looks for a folder that no object has made yet.
state = jax.tree.map(jax.numpy.asarray, state)
def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.manifest.write = killed
with checkpoints.Checkpoints(as_path(sys.argv[1], ""), keep=checkpoints.Keep(2), say=print) as found:
    found.save(state._replace(rng=jax.random.key(step)), step=step, **facts)
"""


def test_a_save_that_was_killed_is_no_checkpoint(gs, run):
    workdir = as_path(f"{gs}/killed", "--workdir")
    save(workdir, run, (6,))
    _, config, corpus, states = run
    facts = dict(data_state={}, description=describe(config, corpus))
    told = pickle.dumps((9, jax.device_get(states[9]._replace(rng=None)), facts))
    done = subprocess.run([sys.executable, "-c", KILLED, str(workdir)], input=told, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]
    left = listing(workdir / "checkpoints" / "9")
    assert any(name.startswith("params/d/") for name in left) and "commit_success.txt" not in left
    assert load_run(workdir).step == 6  # a reader passes over it and leaves it
    assert listing(workdir / "checkpoints" / "9") == left
    resumed = resume(workdir, run, said := [])
    assert said == [] and resumed.step == 6 and listing(workdir / "checkpoints" / "9") == {}
    save(workdir, run, (9,))
    assert resume(workdir, run, []).step == 9


def test_a_run_that_was_copied_from_gs_and_to_gs(workdir, run, written, tmp_path):
    filesystem(workdir).get(str(workdir), str(tmp_path / "here"), recursive=True)
    assert equal(resume(tmp_path / "here", run, said := []).state, run[3][9]) and said == []
    there = workdir.parent / "copied"
    filesystem(workdir).put(f"{written}/", str(there), recursive=True)
    assert equal(resume(there, run, said).state, run[3][9]) and said == []
    name = next(name for name in listing(there / "checkpoints" / "9") if name.startswith("rest/d/"))
    content = (there / "checkpoints" / "9" / name).read_bytes()
    write_bytes(there / "checkpoints" / "9" / name, content[:-1] + bytes([content[-1] ^ 1]))
    assert resume(there, run, said).step == 6 and name in said[0]


# Workdirs that are copied to s3://


def test_an_upload_that_was_cut_is_no_checkpoint(s3, run, written, tmp_path, monkeypatch):
    remote = as_path(f"{s3}/cut", "--workdir")
    home = Mirror(remote, "--workdir", last=(manifest.NAME,))
    shutil.copytree(written / "checkpoints" / "6", home.folder / "checkpoints" / "6")
    home.upload()
    shutil.copytree(written / "checkpoints" / "9", home.folder / "checkpoints" / "9")
    store, sent = filesystem(remote), []
    put = type(store).put_file

    def failing(source, target):
        if source.endswith(manifest.NAME):
            raise ConnectionError("the line is cut")
        sent.append(put(store, source, target))

    monkeypatch.setattr(store, "put_file", failing)
    with pytest.raises(UserError, match=f"--workdir: cannot write to '{s3}/cut': the store cannot be reached"):
        home.upload()
    assert sent
    monkeypatch.setenv("OASIS_JAX_CACHE", str(tmp_path / "other machine"))
    folder = readable(remote, "--workdir")
    assert load_run(remote).step == 6
    assert resume(folder, run, said := []).step == 6 and manifest.NAME in said[0]


@pytest.mark.slow
def test_a_run_goes_on_in_a_store_as_it_does_here(bucket, run, tmp_path, monkeypatch):
    """Interrupted, and gone on with by another machine: to the last bit the losses of a run that never was."""
    often = RunConfig(steps=4, log_interval=1, checkpoint_interval=2, eval_interval=3, telemetry_interval=0)
    config = dataclasses.replace(run[0], run=often, optimizer=OptimizerConfig(warmup_steps=2))
    look, there = {"nothing": lambda *arguments: {}}, f"{bucket}/trained"
    fit(config, tmp_path / "here", evaluators=look)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, there, evaluators={"interrupts": interrupt})
    left = listing(as_path(there, ""))
    assert NAME not in left and {"metrics.jsonl", f"checkpoints/2/{manifest.NAME}"} <= left.keys()
    monkeypatch.setenv("OASIS_JAX_CACHE", str(tmp_path / "other machine"))
    fit(config, there, evaluators=look)
    losses = lambda workdir: [(line["step"], line["loss"]) for line in read_metrics(workdir)]
    assert losses(there) == losses(tmp_path / "here") and len(losses(there)) == 4
    assert load_run(there).step == 4 and NAME not in listing(as_path(there, ""))
    with pytest.raises(UserError, match="holds a run with another config"):
        fit(dataclasses.replace(config, run=dataclasses.replace(often, seed=5)), there)
