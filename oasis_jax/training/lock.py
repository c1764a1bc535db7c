"""One writer a workdir: a lock file that says who trains there, and shows that it is alive."""

import contextlib
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from oasis_jax.errors import UserError
from oasis_jax.storage import Path, in_words, is_remote
from oasis_jax.training.distributed import agreed, is_first
from oasis_jax.training.lock_files import LocalFiles, ObjectFiles

NAME = "training.lock"
# The holder touches the file this often. One of another machine that has not done so for STALE_SECONDS is gone.
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class WorkdirLock:
    """Holds a workdir for training; a context manager. Reading needs none.

    The file appears whole or not at all, for one of several that try, see `lock_files`. A holder on this machine is
    gone when its process is. One on another machine is watched until its file is touched, or has not been for
    STALE_SECONDS by the clock of the file system or store.

    Args:
      workdir: an existing folder, or one in an object store.
      say: prints a line.
      heartbeat, stale: seconds, see above.

    Raises:
      UserError: somebody else trains in it.
    """

    def __init__(
        self,
        workdir: Path,
        say: Callable[[str], None],
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ):
        self._workdir, self._path, self._say = workdir, workdir / NAME, say
        self._files = ObjectFiles(workdir) if is_remote(workdir) else LocalFiles(workdir)
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
            with contextlib.suppress(self._files.away):
                if self._held():
                    self._files.remove(NAME)

    def check(self) -> None:
        """Raises UserError where the workdir was taken over, as from a process that stood still for long."""
        if self._lost:
            raise UserError(
                f"--workdir: {str(self._workdir)!r} was taken over by another process while this one stood still; "
                "nothing more is written"
            )

    def _acquire(self) -> None:
        try:
            with in_words(self._workdir, f"--workdir: cannot lock {str(self._workdir)!r}"):
                while not self._files.create(NAME, self._me):
                    self._remove(self._wait_for())
        except OSError as error:
            raise UserError(f"--workdir: cannot lock {str(self._workdir)!r}: {error.strerror}") from None

    def _wait_for(self) -> dict[str, Any] | None:
        """The holder, once it is known to be gone (None: there is no lock); raises UserError for one that lives."""
        first, said = None, False
        while True:
            holder, touched = self._files.read(NAME)
            if touched is None:
                return None
            if _is_here(holder):
                if not _is_alive(holder):
                    return holder
                raise self._refusal(holder)
            if self._files.now() - touched > self._stale:
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

    def _remove(self, gone: dict[str, Any] | None) -> None:
        """Takes the lock of one who is gone away. Of several who want to, one at a time, so that none takes away the
        lock that another has put there meanwhile.
        """
        if gone is None:
            return
        turn = f".{NAME}-takeover"
        if self._files.create(turn, self._me):
            if self._files.read(NAME)[0].get("token") == gone.get("token"):
                self._files.remove(NAME)
            self._files.remove(turn)
            return
        _, begun = self._files.read(turn)
        if begun is not None and self._files.now() - begun > self._stale:  # killed in its turn
            self._files.remove(turn)
        else:
            time.sleep(0.01)

    def _held(self) -> bool:
        return self._files.read(NAME)[0].get("token") == self._me["token"]

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat):
            try:
                if not self._held():
                    self._lost = True
                    return
                self._files.touch(NAME, self._me)
            except self._files.away:  # a file system or store that is away for a moment; the next look tells
                continue


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
