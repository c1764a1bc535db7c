"""What a run tells while it trains: metrics.jsonl, trackers, a progress bar."""

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from oasis_jax.config import Config
from oasis_jax.config.schema import LARGEST
from oasis_jax.errors import UserError, printable
from oasis_jax.reading import read_bytes
from oasis_jax.storage import Path, as_path, in_words, is_remote, write_bytes
from oasis_jax.training.trackers import TensorBoard, Tracker, Wandb

FILE_NAME = "metrics.jsonl"
_MOST = 2**30  # bytes: some millions of logged steps
_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_SECONDS_BETWEEN_REWRITES = 30.0
_SPENT_ON = ("data", "transfer", "device")


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict]:
    """The lines of a workdir's metrics.jsonl, in order: a step and numbers. What a killed run left half-written, and
    what another hand wrote that is no such line or number, is skipped.

    Raises:
      UserError: there is something of that name that cannot be read, or more than 1 GiB of it.
    """
    try:
        text = read_bytes(as_path(workdir, "--workdir") / FILE_NAME, _MOST).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for entry in text.splitlines():
        try:
            line = json.loads(entry)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(step := line.get("step")) is int and 0 <= step <= LARGEST:
            lines.append({name: value for name, value in line.items() if _is_number(value)})
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not abs(value) > sys.float_info.max  # NaN and what a float holds


class MetricsWriter:
    """Appends to metrics.jsonl, one flushed line a step, and to trackers where asked to; a context manager.

    In an object store the file is written anew, at most every half minute, before each checkpoint and at the end.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        tensorboard: bool = False,
        wandb: Config | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        """Continues after `step`: lines of later steps, which will come again, are dropped.

        Args:
          workdir: of the run.
          step: the last one that is done.
          tensorboard: write its files, too.
          wandb: the run's config, where Weights & Biases is to have it and the numbers.
          check: raises UserError where nothing more may be written, asked at the end of a run in an object store.

        Raises:
          UserError: a tracker that is asked for is not installed or does not start, or the file cannot be written.
        """
        self._check = check
        self._trackers: list[Tracker] = [TensorBoard(workdir, step)] if tensorboard else []
        if wandb:
            self._trackers.append(Wandb(workdir, wandb))
        kept = "".join(json.dumps(line) + "\n" for line in read_metrics(workdir) if line["step"] <= step)
        path = workdir / FILE_NAME
        if is_remote(path):
            self._file = _Rewritten(path, kept)
            return
        partial = path.with_suffix(".partial")
        try:
            partial.unlink(missing_ok=True)  # a link of this name would be written through
            with partial.open("x") as file:
                file.write(kept)
            partial.replace(path)
            self._file = path.open("a")
        except OSError as error:
            self._close_trackers(error)
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self._close_file(error)
        finally:
            self._close_trackers(error)

    def _close_file(self, error: BaseException | None) -> None:
        if isinstance(self._file, _Rewritten):
            with contextlib.suppress(UserError) if error else contextlib.nullcontext():  # what ended the run is said
                self._check()
                self._file.write_all()
        else:
            with contextlib.suppress(OSError):  # every line was flushed, and what could not be was said
                self._file.close()

    def _close_trackers(self, error: BaseException | None) -> None:
        for tracker in self._trackers:
            tracker.close(error)

    def sync(self) -> None:
        """Returns when every line is where a checkpoint may rely on it."""
        if isinstance(self._file, _Rewritten):
            self._file.write_all()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {"step": step, **values, "time": seconds since 1970}.

        Raises:
          UserError: the disk is full, or the like.
        """
        try:
            self._file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written at step {step}: {error.strerror}") from None
        for tracker in self._trackers:
            tracker.write(step, values)


class _Rewritten:
    """A text in an object store, which cannot be appended to."""

    def __init__(self, path: Path, text: str):
        self.name, self._path, self._text, self._written = str(path), path, text, time.monotonic()
        self.write_all()

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        if time.monotonic() - self._written > _SECONDS_BETWEEN_REWRITES:
            self.write_all()

    def write_all(self) -> None:
        with in_words(self._path, f"{self.name}: cannot be written"):
            write_bytes(self._path, self._text.encode())
        self._written = time.monotonic()


class NoWriter(contextlib.nullcontext):
    """What the other processes of a run write."""

    def __enter__(self) -> "NoWriter":
        return self

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes nothing: process 0 does."""

    def sync(self) -> None:
        """Waits for nothing."""


class Speed:
    """Tokens per second since the last look, without compilation, evaluation and saving, and where the time went."""

    def __init__(self, tokens_per_step: int, *, flops_per_token: float = 0.0, peak_flops: float | None = None):
        """peak_flops: of all devices together, per second; None: unknown, and so is their utilisation."""
        self._tokens_per_step, self._flops_per_token, self._peak_flops = tokens_per_step, flops_per_token, peak_flops
        self._since: tuple[int, float] | None = None
        self._spent = dict.fromkeys(_SPENT_ON, 0.0)

    def restart(self, step: int) -> None:
        """Counts from here: what came before is not training."""
        self._since = (step, time.perf_counter())
        self._spent = dict.fromkeys(_SPENT_ON, 0.0)

    @contextlib.contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """What happens inside is counted as "<on>_share" of the time; `on` is data, transfer or device."""
        began = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """{} before the first restart, later over the steps since the last look:

        "tokens_per_second"; "step_seconds"; "data_share", waiting for the next batch (a data stall); "transfer_share",
        putting it on devices; "device_share", waiting for results (high is good: the host keeps ahead); "mfu", model
        FLOP utilisation (Chowdhery et al., arXiv 2204.02311) with the FLOPs of `flops.training_flops`, where the
        devices' peak is known.
        """
        if self._since is None:
            return {}
        steps, seconds = step - self._since[0], time.perf_counter() - self._since[1]
        rate = steps * self._tokens_per_step / seconds
        found = {"tokens_per_second": round(rate, 1), "step_seconds": round(seconds / steps, 6)}
        found |= {f"{name}_share": round(spent / seconds, 4) for name, spent in self._spent.items()}
        if self._peak_flops:
            found["mfu"] = round(rate * self._flops_per_token / self._peak_flops, 4)
        self.restart(step)
        return found


class ProgressBar:
    """Loss, tokens per second and time left: a bar on a terminal, now and then a plain line elsewhere; a context
    manager.
    """

    def __init__(self, *, steps: int, tokens_per_step: int, silent: bool = False):
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        self._bar = Progress(
            BarColumn(20),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps)
        self._last_line = time.monotonic()
        self._rate = 0.0

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the bar if there is one."""
        self._console.print(printable(text), markup=False)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows where the run is after `step`."""
        self._rate = values.get("tokens_per_second", self._rate)
        text = f"step {step}/{self._steps}" + (f"  loss {values['loss']:.4f}" if "loss" in values else "  skipped")
        if self._rate:
            left = datetime.timedelta(seconds=round((self._steps - step) * self._tokens_per_step / self._rate))
            text += f"  {self._rate:,.0f} tokens/s  {left} left"
        self._bar.update(self._task, completed=step, description=text)
        if self._bar.disable and (
            step == self._steps or time.monotonic() - self._last_line > _SECONDS_BETWEEN_PLAIN_LINES
        ):
            self._last_line = time.monotonic()
            self.say(text)
