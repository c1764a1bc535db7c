"""Who may train in a workdir, tried with real processes and with the locks of machines that are not there."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from oasis_jax.errors import UserError
from oasis_jax.training import lock_files
from oasis_jax.training.lock import NAME, WorkdirLock

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from oasis_jax.training.lock import WorkdirLock
with WorkdirLock(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(workdir: pathlib.Path, seconds: float = 300) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, workdir, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def lock(workdir: pathlib.Path, said: list[str] | None = None, **options) -> WorkdirLock:
    return WorkdirLock(workdir, (said if said is not None else []).append, **options)


def elsewhere(workdir: pathlib.Path, age: float) -> None:
    """The lock of a process of another machine."""
    holder = {"host": "far", "machine": ["far", "other boot"], "token": "theirs", "pid": 3, "since": time.time() - age}
    (workdir / NAME).write_text(json.dumps(holder))
    os.utime(workdir / NAME, (time.time() - age,) * 2)


def test_a_living_holder_is_named_and_a_killed_one_is_followed(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"is being trained in by process {process.pid} on .*, for 0 h 0 min ") as error:
        lock(tmp_path).__enter__()
    assert "\n" not in str(error.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path):
    with lock(tmp_path):
        holder = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(holder | {"began": "17"}))
    with lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["began"] == holder["began"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"machine": 3}'])
def test_a_lock_that_cannot_be_read_counts_by_its_age(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    os.utime(tmp_path / NAME, (time.time() - 61,) * 2)
    with lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_another_machine_is_gone_when_its_lock_is_old_or_stays_untouched(tmp_path):
    elsewhere(tmp_path, age=61)
    with lock(tmp_path):
        pass
    said = []
    elsewhere(tmp_path, age=0)
    with lock(tmp_path, said, heartbeat=0.05, stale=0.3):
        pass
    (line,) = said
    assert "process" in line and "on far" in line and "whether it lives" in line


def test_another_machine_that_touches_its_lock_is_named(tmp_path):
    elsewhere(tmp_path, age=0)
    toucher = threading.Timer(0.4, os.utime, (tmp_path / NAME,))
    toucher.start()
    with pytest.raises(UserError, match=r"is being trained in by process .* on far"):
        lock(tmp_path, heartbeat=0.1, stale=30).__enter__()
    toucher.join()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "theirs"


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    for _ in range(20):
        elsewhere(tmp_path, age=61)
        held, start = [], threading.Barrier(5)

        def attempt(start=start, held=held):
            start.wait()
            mine = lock(tmp_path)
            try:
                mine.__enter__()
                held.append(mine)
            except UserError:
                pass

        threads = [threading.Thread(target=attempt) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1
        held[0].__exit__()
    assert list(tmp_path.iterdir()) == []


def test_who_lost_the_workdir_is_told_and_leaves_the_new_holder_alone(tmp_path):
    with lock(tmp_path, heartbeat=0.05) as mine:
        mine.check()
        elsewhere_text = json.dumps({"token": "theirs"})
        (tmp_path / NAME).write_text(elsewhere_text)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                mine.check()
                time.sleep(0.02)
            except UserError as error:
                assert "was taken over by another process" in str(error)
                break
        else:
            pytest.fail("nobody noticed")
    assert (tmp_path / NAME).read_text() == elsewhere_text


def test_a_second_training_in_a_workdir_is_refused_in_one_line_and_touches_nothing(tmp_path):
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text("from oasis_jax.config import Config\n\ndef get_config():\n    return Config()\n")
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    with lock(workdir):
        command = [sys.executable, ROOT / "train.py", f"--config={config}", f"--workdir={workdir}"]
        found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and f"is being trained in by process {os.getpid()} on" in line
    assert [path.name for path in workdir.iterdir()] == ["checkpoints"] and unfinished.is_dir()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), UserError("training.lock: cannot be read")])
def test_a_file_system_that_is_away_for_a_moment_ends_no_heartbeat(tmp_path, monkeypatch, error):
    failed = threading.Event()

    def away(*arguments):
        failed.set()
        raise error

    with lock(tmp_path, heartbeat=0.02) as mine:
        with monkeypatch.context() as patch:
            patch.setattr(lock_files, "read_bytes", away)
            assert failed.wait(20)
        os.utime(tmp_path / NAME, (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / NAME).stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / NAME).stat().st_mtime > 1
        mine.check()
    assert list(tmp_path.iterdir()) == []
