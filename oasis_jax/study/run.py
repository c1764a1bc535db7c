"""Runs the cells of a study: one after the other, in several processes, in pieces, or on several hosts that share a
folder. A cell that somebody works on is left to them; one that is done is never done again.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax

from oasis_jax.errors import Preempted, UserError, printable
from oasis_jax.plain_names import plain
from oasis_jax.study.cells import RESULT, run_cell
from oasis_jax.study.design import Cell, Study
from oasis_jax.study.kept import take_up_kept
from oasis_jax.study.records import read_json, write_json
from oasis_jax.training.lock import WorkdirLock

IDENTITY = "study.json"

_POLL_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 30.0

Load = Callable[[], Study]  # picklable, for processes that are started


def prepare(study: Study, out: pathlib.Path) -> None:
    """Makes the folder, or sees that it is this study's; all configs are built before anything is trained. Where it
    holds the numbers of a study and no cells, those are done.

    Raises:
      UserError: another study's folder, one that cannot be written, a config that does not fit together.
    """
    identity = {cell.path: study.identity(cell) for cell in study.cells()}
    out.mkdir(parents=True, exist_ok=True)
    stored = (read_json(out / IDENTITY) or {}).get("cells", {})
    if not isinstance(stored, dict):
        raise UserError(f"--out: {str(out / IDENTITY)!r} does not say what cells the study has; delete it")
    for path, digest in stored.items():
        if path in identity and identity[path] != digest:
            raise UserError(
                f"--out: {str(out)!r} holds another study: the settings of {path} were others; take another folder"
            )
    take_up_kept(out, identity)
    write_json(out / IDENTITY, {"title": study.title, "cells": stored | identity})


def run_study(
    load: Load, out: pathlib.Path, *, methods: Sequence[str] = (), workers: int = 1, minutes: float | None = None
) -> None:
    """Does what is left to do, and returns when every cell is done or in the hands of another process.

    Args:
      load: makes the study; called in every worker.
      out: folder of the study; on several hosts the same one.
      methods: whose cells; (): all.
      workers: processes that share this machine's cores among them. On accelerators one a device: worker i sees
        the i-th of CUDA_VISIBLE_DEVICES where that is set.
      minutes: after so many everything is saved and Preempted raised.

    Raises:
      UserError: unequal starts, or something else the user can mend.
      Preempted: the time is up, or SIGTERM came; the same call goes on.
    """
    study = load()
    prepare(study, out)
    deadline = None if minutes is None else time.time() + 60 * minutes
    if workers == 1:
        _work(load, out, methods, deadline)
    else:
        _work_together(load, methods, out, workers, deadline)


def _cells(study: Study, methods: Sequence[str]) -> list[Cell]:
    return [cell for cell in study.cells() if not methods or cell.method in methods]


def _left(cells: Sequence[Cell], out: pathlib.Path) -> int:
    return sum(not (out / cell.path / RESULT).exists() for cell in cells)


# One process


def _work(
    load: Load,
    out: pathlib.Path,
    methods: Sequence[str],
    deadline: float | None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Takes one cell after the other that nobody works on."""
    study, say = load(), say or _say
    cells = _cells(study, methods)
    _keep_compiled(out)
    try:
        with _ending(deadline):
            _work_through(study, cells, out, deadline, say)
    except Preempted as notice:
        done = f"{len(cells) - _left(cells, out)} of {len(cells)} cells are done"
        raise Preempted(f"{done}; {notice}", compiling=notice.compiling) from None


def _work_through(
    study: Study, cells: Sequence[Cell], out: pathlib.Path, deadline: float | None, say: Callable[[str], None]
) -> None:
    total, began = len(cells), time.monotonic()
    first = total - _left(cells, out)
    for cell in cells:
        with _claimed(out, cell) as mine:
            if not mine:
                continue
            record = run_cell(study, cell, out)
        jax.clear_caches()  # hundreds of models, each used once
        done = total - _left(cells, out)
        say(_progress(done, total, done - first, time.monotonic() - began, cell, record["failed"]))
        if deadline is not None and time.time() > deadline:
            _end(signal.SIGTERM, None)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _progress(done: int, total: int, new: int, seconds: float, cell: Cell | None = None, failed: str | None = None):
    left = time.strftime("%H:%M:%S", time.gmtime(seconds / new * (total - done))) if new else "?"
    what = "" if cell is None else f"  {cell.arm}/{cell.method}/seed{cell.seed}" + (f" {failed}" if failed else "")
    return f"{done}/{total} cells{what}  {left} left"


@contextlib.contextmanager
def _claimed(out: pathlib.Path, cell: Cell) -> Iterator[bool]:
    """Whether the cell is to be done and nobody else does it; until the block ends it is ours."""
    folder = out / cell.path
    if (folder / RESULT).exists():
        yield False
        return
    claim = folder / "claim"
    claim.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WorkdirLock(claim, lambda text: None))
        except UserError:  # somebody else has it
            yield False
            return
        yield not (folder / RESULT).exists()  # it may have been finished meanwhile


def _keep_compiled(out: pathlib.Path) -> None:
    """The seeds of a method are one program: what one cell compiled the next one reads. A folder a host, since
    programs for a CPU are for that CPU.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(plain(out) / "compiled" / os.uname().nodename))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def _ending(deadline: float | None) -> Iterator[None]:
    """SIGTERM, which comes by itself at the deadline, ends what runs; training listens itself, to save first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _end)
    timer = None
    if deadline is not None:
        timer = threading.Timer(max(deadline - time.time(), 0), os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()
        signal.signal(signal.SIGTERM, previous)


def _end(number: int, frame: object) -> NoReturn:
    raise Preempted("told to end; the same command goes on")


# Several processes


def _work_together(load: Load, methods: Sequence[str], out: pathlib.Path, workers: int, deadline: float | None) -> None:
    """Starts the workers and watches them."""
    spawn = multiprocessing.get_context("spawn")
    cells = _cells(load(), methods)
    total = len(cells)
    first = last = total - _left(cells, out)
    began = said = time.monotonic()
    processes = [spawn.Process(target=_worker, args=(load, out, methods, deadline, i, workers)) for i in range(workers)]
    with _ending(None):
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                time.sleep(_POLL_SECONDS)
                done, now = total - _left(cells, out), time.monotonic()
                if done > last and (now - said > _SECONDS_BETWEEN_LINES or done == total):
                    _say(_progress(done, total, done - first, now - began))
                    last, said = done, now
                if any(process.exitcode for process in processes):
                    break  # one failed; the others save what they do
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                process.join()
    _report_ends(out, [process.exitcode for process in processes], f"{total - _left(cells, out)} of {total} cells")


def _worker(
    load: Load, out: pathlib.Path, methods: Sequence[str], deadline: float | None, index: int, count: int
) -> None:
    """What a started process runs: its exit code is 0, 143 when told to end, 2 after a mistake that it wrote down."""
    _take_share(index, count)
    problem = out / f"worker{index}.problem"
    problem.unlink(missing_ok=True)
    try:
        _work(load, out, methods, deadline, say=lambda text: None)
    except Preempted as notice:
        if notice.compiling:  # see oasis_jax.commands.parser.run_main
            os._exit(143)
        raise SystemExit(143) from None
    except UserError as error:
        problem.write_text(str(error), encoding="utf-8", errors="backslashreplace")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _take_share(index: int, count: int) -> None:
    """Cores, and a GPU where several are visible, before JAX starts: small models gain nothing from more threads."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index % len(cores) :: count] or cores)
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]


def _report_ends(out: pathlib.Path, codes: Sequence[int | None], done: str) -> None:
    for index, code in enumerate(codes):
        problem = out / f"worker{index}.problem"
        if code == 2 and problem.exists():
            raise UserError(problem.read_text(encoding="utf-8"))
    if 143 in codes or -signal.SIGTERM in codes:
        raise Preempted(f"{done} are done; told to end; the same command goes on")
    if bad := [code for code in codes if code]:
        raise RuntimeError(f"a worker ended with code {bad[0]}; the newest log.txt of a cell says more")
