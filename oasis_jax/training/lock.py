"""One writer a workdir: a lock file that says who trains there, and shows that it is alive."""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.reading import read_bytes
from oasis_jax.training.distributed import agreed, is_first

NAME = "training.lock"
# The holder touches the file this often. One of another machine that has not done so for STALE_SECONDS is gone.
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_MOST = 2**16  # bytes of a lock


class WorkdirLock:
    """Holds a workdir for training; a context manager. Reading needs none.

    The file appears whole or not at all, by a hard link, which shared file systems make for one of several that try. A
    holder on this machine is gone when its process is. One on another machine is watched until its file is touched, or
    has not been for STALE_SECONDS by the file system's own clock.

    Args:
      workdir: an existing folder.
      say: prints a line.
      heartbeat, stale: seconds, see above.

    Raises:
      UserError: somebody else trains in it.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        say: Callable[[str], None],
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ):
        self._workdir, self._path, self._say = workdir, workdir / NAME, say
        self._heartbeat, self._stale = heartbeat, stale
        self._me = _process(os.getpid()) | {"token": uuid.uuid4().hex, "since": round(time.time(), 3)}
        self._ended, self._lost, self._thread = threading.Event(), False, None

    def __enter__(self) -> "WorkdirLock":
        refusal = ""
        if is_first():
            try:
                self._acquire()
            except UserError as error:
                refusal = str(error)
        if refusal := agreed(refusal):
            raise UserError(refusal)
        if is_first():
            self._thread = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
            if self._held():
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def check(self) -> None:
        """Raises UserError where the workdir was taken over, as from a process that stood still for long."""
        if self._lost:
            raise UserError(
                f"--workdir: {str(self._workdir)!r} was taken over by another process while this one stood still; "
                "nothing more is written"
            )

    def _acquire(self) -> None:
        mine = self._path.with_name(f".{NAME}-{self._me['token']}")
        try:
            mine.write_text(json.dumps(self._me))
            while not _created(mine, self._path):
                self._remove(self._wait_for(mine), mine)
        except OSError as error:
            raise UserError(f"--workdir: cannot lock {str(self._workdir)!r}: {error.strerror}") from None
        finally:
            mine.unlink(missing_ok=True)

    def _wait_for(self, clock: pathlib.Path) -> dict[str, Any] | None:
        """The holder, once it is known to be gone (None: there is no lock); raises UserError for one that lives."""
        first, said = None, False
        while True:
            holder, touched = _read(self._path)
            if touched is None:
                return None
            if _is_here(holder):
                if not _is_alive(holder):
                    return holder
                raise self._refusal(holder)
            os.utime(clock)
            age = clock.stat().st_mtime - touched
            if age > self._stale:
                return holder
            if first not in (None, touched):
                raise self._refusal(holder)
            first = touched
            if not said:
                self._say(f"{self._path}: {_in_words(holder)}; looking for up to {self._stale:.0f} s whether it lives")
                said = True
            time.sleep(min(1.0, self._heartbeat / 2))

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"--workdir: {str(self._workdir)!r} is being trained in by {_in_words(holder)}; wait for it, end it, or "
            "take another workdir"
        )

    def _remove(self, gone: dict[str, Any] | None, mine: pathlib.Path) -> None:
        """Takes the lock of one who is gone away. Of several who want to, one at a time, so that none takes away the
        lock that another has put there meanwhile.
        """
        if gone is None:
            return
        turn = self._path.with_name(f".{NAME}-takeover")
        with contextlib.suppress(FileNotFoundError):
            if _created(mine, turn):
                if _read(self._path)[0].get("token") == gone.get("token"):
                    self._path.unlink()
                turn.unlink()
            elif mine.stat().st_mtime - turn.stat().st_mtime > self._stale:  # killed in its turn
                turn.unlink()
            else:
                time.sleep(0.01)

    def _held(self) -> bool:
        return _read(self._path)[0].get("token") == self._me["token"]

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat):
            try:
                if not self._held():
                    self._lost = True
                    return
                os.utime(self._path)
            except OSError:  # a file system that is away for a moment; the next look tells
                continue


def _created(source: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether `path` was not there and is now what `source` is; one of several that try has True."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(source.read_text())
        except FileExistsError:
            return False
    return True


def _read(path: pathlib.Path) -> tuple[dict[str, Any], float | None]:
    """Who holds a lock, {} where that is not readable, and when the file was touched; None: there is none."""
    try:
        text = read_bytes(path, _MOST)  # opening it asks a shared file system for its newest state
        touched = os.stat(path).st_mtime
    except FileNotFoundError:
        return {}, None
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}, touched
    return holder if isinstance(holder, dict) else {}, touched


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from all others: machine, since its start, and namespace; number, and when it began."""
    machine = [socket.gethostname()]
    with contextlib.suppress(OSError):
        machine.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        machine.append(os.readlink("/proc/self/ns/pid"))
    return {"host": machine[0], "machine": machine, "pid": pid, "began": _began(pid)}


def _began(pid: int) -> str:
    """When a process began, in clock ticks since the machine did; '' where the system does not say."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _process(os.getpid())["machine"]


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except PermissionError:
        pass
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return _began(holder["pid"]) == holder.get("began")


def _in_words(holder: dict[str, Any]) -> str:
    if not isinstance(holder.get("since"), int | float):
        return "a process that its lock does not name"
    hours, seconds = divmod(max(round(time.time() - holder["since"]), 0), 3600)
    return f"process {holder.get('pid')} on {holder.get('host')}, for {hours} h {seconds // 60} min {seconds % 60} s"
