"""What may happen to a run, done to real ones: after each fault the same command goes on, and the losses are
those of an undisturbed run.

make test-faults        prints the counts; OASIS_FAULT_KILLS=40 for fewer kills than 200
"""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from programs import end
from small_disks import fill, tmpfs

pytestmark = pytest.mark.faults

ROOT = pathlib.Path(__file__).parents[2]
KILLS, SHARES = int(os.environ.get("OASIS_FAULT_KILLS", 200)), 8
STEPS = 15 * KILLS // SHARES + 25
# A parameter-heavy model with a checkpoint every few steps: a good part of the time goes into saving, and kills fall
# into it.
CONFIG = """
from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig

def get_config():
    return Config(
        model=ModelConfig(preset="oasis", inputs="vectors", num_layers=1, width=32, num_heads=2, mlp_dim=3008),
        data=DataConfig(corpus="trigger", sequence_length=9, batch_size=8, trigger_dim=6),
        optimizer=OptimizerConfig(warmup_steps=7, schedule="constant"),
        mesh=MeshConfig(data=-1),
        run=RunConfig(steps=60, checkpoint_interval=7, telemetry_interval=5, keep_checkpoints=2),
    )
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """Compiled programs, shared by all runs: a fault suite is about other things."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(config, cache):
    """start(workdir, *flags, devices=1) -> a running train.py; what still runs at the end is killed."""
    running = []

    def run(workdir: pathlib.Path, *flags: str, devices: int = 1) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [
            sys.executable,
            "-W",
            "error",
            ROOT / "train.py",
            f"--config={config}",
            f"--workdir={workdir}",
            *flags,
        ]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment))
        return running[-1]

    yield run
    end(running)


@pytest.fixture
def undisturbed(start, tmp_path):
    """undisturbed(steps, *flags) -> the logged lines of a run that nothing happened to."""

    def run(steps: int, *flags: str) -> list[dict]:
        finish(start(tmp_path / "undisturbed", f"--set=run.steps={steps}", *flags))
        return logged(tmp_path / "undisturbed")

    return run


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 300) -> str:
    """What a process said on stderr, once it has ended with this code."""
    _, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, errors
    return errors


def one_line(errors: str) -> str:
    """The only line of an error, which is not a traceback."""
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    return lines[0]


def logged(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides; every line has to be whole."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if not name.endswith(("time", "_per_second", "_seconds", "_share"))
        }
        for line in lines
    ]


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    path = workdir / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < step):
        time.sleep(0.002)


def test_sigkill_at_random_moments(start, undisturbed, tmp_path, share_number, record):
    expected = undisturbed(STEPS)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    chance = random.Random(seed)
    workdir = tmp_path / "run"
    kills, saving = KILLS // SHARES, 0
    for kill in range(kills):
        # Each kill falls somewhere into its share of the steps, the delay into a step, a save, or what lies between.
        process = start(workdir, f"--set=run.steps={STEPS}")
        wait_for_step(process, workdir, round((kill + chance.random()) * (STEPS - 20) / kills))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        saving += any("tmp" in path.name for path in workdir.glob("checkpoints/*"))
    finish(start(workdir, f"--set=run.steps={STEPS}"))
    assert logged(workdir) == expected
    record(
        f"SIGKILL, share {share_number} of {SHARES}: {kills} kills, {saving} of them during a save; {STEPS} losses "
        "bitwise equal"
    )


@pytest.fixture(params=range(SHARES), ids=lambda i: f"share{i}")
def share_number(request) -> int:
    return request.param


def test_sigterm_saves_the_step_it_falls_into(start, undisturbed, tmp_path, record):
    expected, workdir, saved = undisturbed(60), tmp_path / "run", []
    for step in (3, 16, 40):
        process = start(workdir, "--set=run.steps=60")
        wait_for_step(process, workdir, step)
        process.terminate()
        errors = finish(process, 143)
        saved.append(max(int(path.name) for path in (workdir / "checkpoints").iterdir()))
        assert f"step {saved[-1]}: told to end (SIGTERM), saved" in errors and saved[-1] >= step
    finish(start(workdir, "--set=run.steps=60"))
    assert logged(workdir) == expected
    record(f"SIGTERM: 3 notices, saved at steps {saved}; 60 losses bitwise equal")


def test_sigterm_while_the_first_step_is_compiled(start, tmp_path, record):
    """Forty layers one by one take minutes; nothing is saved, and the workdir is free again."""
    process = start(tmp_path / "run", "--set=model.num_layers=40", "--set=model.stack=unroll")
    while "from the start" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    began = time.monotonic()
    process.terminate()
    errors = finish(process, 143)
    took = time.monotonic() - began
    assert "before the first step was taken: there is nothing to save" in errors and took < 10
    assert not [*(tmp_path / "run" / "checkpoints").iterdir(), *(tmp_path / "run").glob("training.lock")]
    record(f"SIGTERM during compilation: ended within {took:.1f} s, nothing to save")


def test_a_full_disk(start, undisturbed, tmp_path, record):
    expected = undisturbed(60)
    with tmpfs(tmp_path / "small", "size=6m") as disk:
        for _ in range(2):  # a second try meets the same disk and spoils nothing
            error = one_line(finish(start(disk / "run", "--set=run.steps=60"), 2))
            assert "no room for checkpoint" in error and "the last good checkpoint is step" in error
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        finish(start(disk / "run", "--set=run.steps=60"))
        assert logged(disk / "run") == expected
    record("full disk: 2 errors of one line; with room again, 60 losses bitwise equal")


def test_a_disk_that_fills_while_a_checkpoint_is_written(start, undisturbed, tmp_path, record):
    expected, said = undisturbed(60), []
    with tmpfs(tmp_path / "small", "size=60m") as disk:
        for step in (7, 28):
            process = start(disk / "run", "--set=run.steps=60")
            while process.poll() is None and not [*disk.glob(f"run/checkpoints/{step}*")]:
                time.sleep(0.0003)
            filler = fill(disk)
            said.append(one_line(finish(process, 2)))
            assert any(words in said[-1] for words in ("the disk is full", "no room for", "No space left on device"))
            filler.unlink()
        finish(start(disk / "run", "--set=run.steps=60"))
        assert logged(disk / "run") == expected
    inside = sum("could not be written: the disk is full" in line for line in said)
    record(f"disk that fills under a run: {len(said)} errors of one line, {inside} in a save; 60 losses bitwise equal")


def test_saves_onto_a_disk_that_fills(tmp_path, record):
    """Many in one process, whatever the storage library's threads are about: nothing but our line, and what was saved
    before is whole.
    """
    script, count = pathlib.Path(__file__).with_name("saves_onto_a_filling_disk.py"), 40
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    with tmpfs(tmp_path / "small", "size=60m") as disk:
        done = subprocess.run(
            [sys.executable, script, disk, str(count), "5"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=900,
        )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "ERROR" not in done.stderr, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    full = [one for one in found if "could not be written: the disk is full" in one["said"]]
    for one in found:
        assert one in full or not one["said"] or "no room for checkpoint" in one["said"], one
        named = f"last good checkpoint is step {one['whole'][0]} " if one["whole"] else "there is no checkpoint yet"
        assert not one["said"] or named in one["said"], one
        assert one["said"] or one["whole"] == [9, 7], one
        assert 7 in one["whole"] or one["meets"] == 7, one
    assert len(found) == count and full
    record(f"disk that fills in a save: {len(full)} of {count} saves met it, no line but ours; what was there is whole")


def test_a_disk_without_room_for_another_file(start, tmp_path, record):
    """There is room for bytes, of which a quota may say the same."""
    with tmpfs(tmp_path / "few", "size=60m,nr_inodes=200") as disk:
        error = one_line(finish(start(disk / "run", "--set=run.steps=60", "--set=run.keep_checkpoints=9"), 2))
        assert "no room for checkpoint 21: it takes up to 128 files, there is room for" in error
        assert "the last good checkpoint is step 14" in error
        subprocess.run(["mount", "-o", "remount,nr_inodes=9000", disk], check=True)
        finish(start(disk / "run", "--set=run.steps=60", "--set=run.keep_checkpoints=9"))
        assert len(logged(disk / "run")) == 60
    record("no room for another file: 1 error of one line; with room again the run ended")


def test_a_full_disk_under_a_report(start, tmp_path, record):
    """Too small for pictures, which are left out by name; too small for any number, which are shown on the terminal."""
    finish(start(tmp_path / "run", "--set=run.steps=7"))
    flags = ["--batches=1", "--measures=default", f"--workdir={tmp_path / 'run'}"]

    def measured(report: pathlib.Path) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "eval.py", f"--report={report}", *flags]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)

    with tmpfs(tmp_path / "small", "size=320k") as disk:
        done = measured(disk)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        left_out = [line for line in done.stderr.splitlines() if "No space left on device" in line]
        assert left_out and all("all numbers are in" in line for line in left_out)
        assert json.loads((disk / "metrics.json").read_text())["complete"]
    with tmpfs(tmp_path / "tiny", "size=8k") as disk:
        done = measured(disk)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "--report: cannot write" in one_line(done.stderr) and "squared error" in done.stdout
    record(
        f"full disk under a report: {len(left_out)} pictures and pages left out by name; numbers shown where none fit"
    )


def test_eight_devices_that_are_seldom_waited_for(start, tmp_path, record):
    """Steps that nobody waits for would fill the threads of a host with several devices, which then wait for each
    other.
    """
    rare = [f"--set=run.{name}_interval=600" for name in ("log", "checkpoint", "telemetry")]
    finish(start(tmp_path / "run", "--set=run.steps=600", *rare, devices=8), seconds=900)
    (line,) = logged(tmp_path / "run")
    assert line["step"] == 600
    record("8 devices, logged once in 600 steps: ended")


def test_a_read_only_workdir(start, tmp_path, record):
    with tmpfs(tmp_path / "locked", "size=1m,ro") as disk:
        error = one_line(finish(start(disk / "run"), 2))
    assert "--workdir: cannot write to" in error and "Read-only file system" in error
    record("read-only workdir: one line, nothing started")


def test_truncated_array_files(start, undisturbed, tmp_path, record):
    expected, workdir = undisturbed(60), tmp_path / "run"
    finish(start(workdir, "--set=run.steps=30"))
    newest = max((path for path in (workdir / "checkpoints").iterdir()), key=lambda path: int(path.name))
    files = sorted(
        (path for path in newest.glob("*/**/*") if path.is_file() and path.stat().st_size > 1),
        key=lambda p: -p.stat().st_size,
    )
    for path in files[:3]:
        os.truncate(path, path.stat().st_size // 2)
    errors = finish(start(workdir, "--set=run.steps=60"))
    assert f"checkpoint {newest.name} is not whole" in errors
    assert logged(workdir) == expected
    record(f"truncated array files: checkpoint {newest.name} passed over by name; 60 losses bitwise equal")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Sums over devices are added in another order; at the config's learning rate training itself would make much of their
# last bits.
GENTLE = "--set=optimizer.learning_rate=2e-4"


def test_a_missing_host(start, undisturbed, tmp_path, record):
    expected, workdir = undisturbed(60, GENTLE), tmp_path / "run"

    def launch(count: int, *flags: str) -> list[subprocess.Popen]:
        port = free_port()
        who = lambda i: (f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}")
        return [start(workdir, GENTLE, *flags, *who(i), devices=2) for i in range(count)]

    processes = launch(4, "--set=run.steps=100000")
    wait_for_step(processes[0], workdir, 20)
    processes[2].kill()
    began = time.monotonic()
    others = [process for i, process in enumerate(processes) if i != 2]
    texts = [process.communicate(timeout=180)[1] for process in others]
    took = time.monotonic() - began
    assert all(process.returncode not in (0, None) for process in others)
    assert any("tasks are unhealthy" in text or "another task died" in text for text in texts), texts
    # The rest goes on: two processes of two devices, on the state that four wrote.
    for process in launch(2, "--set=run.steps=60"):
        finish(process)
    np.testing.assert_allclose(
        [line["loss"] for line in logged(workdir)], [line["loss"] for line in expected], rtol=1e-5
    )
    record(f"missing host: the other 3 of 4 ended within {took:.0f} s; 2 went on; 60 losses equal to 1e-5")


def test_four_processes_equal_one_and_checkpoints_move_between_them(start, undisturbed, tmp_path, record):
    expected, workdir = undisturbed(60, GENTLE), tmp_path / "run"
    for count, steps in ((4, 20), (1, 40), (2, 60)):  # processes of two devices, one of eight
        port = free_port()
        flags = [
            (f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}") if count > 1 else ()
            for i in range(count)
        ]
        for process in [
            start(workdir, GENTLE, f"--set=run.steps={steps}", *flag, devices=2 if count > 1 else 8) for flag in flags
        ]:
            finish(process)
    lines = logged(workdir)
    assert [line["step"] for line in lines] == list(range(1, 61))
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in expected], rtol=1e-5)
    record("4 x 2 devices, then 1 x 8, then 2 x 2, on one workdir: 60 losses equal to one device's to 1e-5")


def test_corrupt_data(start, tmp_path, record):
    text, other = (
        tmp_path / "text",
        [f"--set={field}" for field in ("model.inputs=tokens", "data.corpus=files", "data.sequence_length=8")],
    )
    text.mkdir()
    for i in range(5):
        (text / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": f"{i * k % 97} plums " * 5}) + "\n" for k in range(60))
        )
    (text / "3.jsonl").write_bytes((text / "3.jsonl").read_bytes()[:-40] + b"\xff\xfe\n{'no json'}\n")
    flags = [*other, f"--set=data.pattern={text}/*.jsonl", "--set=run.steps=5", "--set=optimizer.warmup_steps=5"]
    error = one_line(finish(start(tmp_path / "stopped", *flags), 2))
    assert "3.jsonl:60: not UTF-8" in error and "data.corrupt=skip" in error
    errors = finish(start(tmp_path / "skipped", *flags, "--set=data.corrupt=skip"))
    assert "left out" in errors and "3.jsonl:60" in errors and "3.jsonl:61" in errors
    shutil.rmtree(text)
    record("corrupt data: named and fatal, or 2 lines named and left out")
