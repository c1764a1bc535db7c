"""The first minutes on a rented accelerator: right or wrong, fast or slow, in ten minutes at most, without a network.

    python benchmarks/first_light.py                       # everything
    python benchmarks/first_light.py --part correctness    # one part, or one process of it: correctness:cudnn

It needs this repository, jax, flax and optax, nothing else. Every result is one line of JSON in the file of results as
soon as it is known; every part is a process with a time limit, so that a crash or a hang loses only itself. On a CPU
all sizes are toys. Exit code 0: all parts ended and all numbers are right; 1: a part failed or a number is wrong; 2:
arguments that do not fit.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import difflib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from _first_light.report import append, show

HERE = pathlib.Path(__file__).parent
LEAST = 15.0  # seconds: with less time left a part is not started
PROBE = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # processes side by side
WHOLE_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


class Part(NamedTuple):
    """A process.

    name: "part" or "part:argument".
    seconds: its limit, of ten minutes.
    module: of _first_light; None where `command` is something else.
    platforms: where it runs unless it is asked for by name.
    """

    name: str
    seconds: float
    module: str | None
    platforms: tuple[str, ...] = ("gpu", "tpu", "cpu")
    environment: dict[str, str] = {}  # noqa: RUF012, never changed
    command: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]


# In this order; those of one family with SHARED_MEMORY run side by side, as they mostly compile.
PARTS = (
    Part("facts", 30, "facts"),
    Part("correctness:cudnn", 120, "correctness", ("gpu",), SHARED_MEMORY),
    Part("correctness:mosaic_gpu", 120, "correctness", ("gpu",), SHARED_MEMORY),
    Part("correctness:mosaic_tpu", 120, "correctness", ("tpu",)),
    Part("correctness:xla", 120, "correctness", environment=SHARED_MEMORY),
    Part("correctness:route", 120, "correctness_route", environment=SHARED_MEMORY),
    Part("attention", 130, "attention"),
    Part("routing", 75, "routing"),
    Part("training:residual", 60, "training", environment=WHOLE_MEMORY),
    Part("training:oasis", 60, "training", environment=WHOLE_MEMORY),
    Part("training:oasis_blocks", 60, "training", environment=WHOLE_MEMORY),
    Part("variants", 300, "variants", ("gpu",)),  # with what time is left
)


def choose(parts: tuple[Part, ...], wanted: list[str] | None, platform: str) -> list[Part]:
    """The parts that were asked for, by their name or their family's, or those of the platform.

    Raises:
      ValueError: no part has this name; the message says which is nearest.
    """
    if not wanted:
        return [part for part in parts if platform in part.platforms]
    names = list(dict.fromkeys(name for part in parts for name in (part.family, part.name)))
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"--part: there is no {name!r}; did you mean {near!r}? There are: {', '.join(names)}")
    families = lambda part: (
        part.name in wanted or (part.family in wanted and (platform in part.platforms or part.family == part.name))
    )
    return [part for part in parts if families(part)]


def groups(parts: list[Part]) -> list[list[Part]]:
    """The parts one after the other, those that run side by side together."""
    found = []
    for part in parts:
        beside = found and found[-1][0].family == part.family and part.environment == SHARED_MEMORY
        if beside and found[-1][0].environment == SHARED_MEMORY:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def run_part(part: Part, seconds: float, out: pathlib.Path, toy: bool) -> bool:
    """Runs a part's process and whatever it starts, and ends them all at the limit. One line says how it went.

    Returns:
      Whether it ended by itself and well.
    """
    command = part.command or (
        *(sys.executable, str(HERE / "_first_light" / "worker.py"), part.module, part.name.partition(":")[2]),
        *("--part", part.name, "--seconds", f"{seconds:.1f}", "--out", str(out), *(["--toy"] if toy else [])),
    )
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | part.environment
    start, cut_off = time.monotonic(), False
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, env=environment, stderr=said, start_new_session=True)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            cut_off = True
        finally:  # its children too, and on an interrupt as well
            _end(process)
        said.seek(0)
        errors = [line for line in said.read().splitlines() if line.strip()][-3:]
    good = not cut_off and process.returncode == 0
    line = {"part": part.name, "name": "end" if good else "cut off" if cut_off else "failed"}
    line |= {"exit": process.returncode, "seconds": time.monotonic() - start, "limit_s": seconds}
    line |= {} if good else {"last_errors": [text[:300] for text in errors]}
    append(out, line)
    show(line)
    return good


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_parts(parts: list[Part], minutes: float, out: pathlib.Path, toy: bool) -> bool:
    """Runs the parts within `minutes`, each with its share of ten; what finds no time left is a line. Whether all
    ended well.
    """
    stop, good = time.monotonic() + 60 * minutes, True
    for group in groups(parts):
        left = stop - time.monotonic()
        least = min(LEAST, group[0].seconds)
        if left < least:
            for part in group:
                append(out, {"part": part.name, "name": "left out", "why": "no time left"})
                show({"part": part.name, "name": "left out"})
            continue
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            ended = [pool.submit(run_part, part, _limit(part, minutes, left), out, toy) for part in group]
            good &= all(one.result() for one in ended)
    return good


def _limit(part: Part, minutes: float, left: float) -> float:
    share = part.seconds * minutes / 10
    return min(left, max(share, min(LEAST, part.seconds)))


def probe() -> tuple[str, str]:
    """The platform and the name of the device that JAX finds, asked in a process of its own, which may hang or fail."""
    try:
        run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        sys.exit("first_light: JAX did not find its devices within 60 s")
    if run.returncode:
        sys.exit(f"first_light: JAX does not start: {(run.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    platform, kind = run.stdout.strip().splitlines()[-1].split("|")
    return platform, kind


def all_right(out: pathlib.Path) -> bool:
    """Whether no line of the file's last run says that a number is wrong or a call failed."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    lines = lines[max(i for i, line in enumerate(lines) if line["part"] == "begin") :]
    return not any(line.get("ok") is False or "failed" in line for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="run this alone; may be repeated")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole")
    parser.add_argument("--out", type=pathlib.Path, help="file of results, one line of JSON each; it is added to")
    parser.add_argument("--toy", action="store_true", help="toy sizes, as on a CPU")
    arguments = parser.parse_args(argv)
    try:
        choose(PARTS, arguments.part, "gpu")  # before a device is asked for
        if not 0 < arguments.minutes < float("inf"):
            raise ValueError(f"--minutes: {arguments.minutes} is no time; a positive number of minutes")
    except ValueError as error:
        print(f"first_light: {error}", file=sys.stderr)
        return 2
    platform, kind = probe()
    toy = arguments.toy or platform == "cpu"
    now = datetime.datetime.now(datetime.UTC)
    card = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    out = (arguments.out or HERE / "results" / f"first_light_{now:%Y-%m-%d}_{card}.jsonl").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = choose(PARTS, arguments.part, platform)
    append(out, {"part": "begin", "date": now.isoformat(timespec="seconds"), "device": kind, "toy": toy})
    good = run_parts(parts, arguments.minutes, out, toy)
    right = all_right(out)
    append(out, {"part": "end", "all_ended": good, "all_right": right})
    print(f"\n{'all right' if good and right else 'NOT all right'}; results in {out}")
    return 0 if good and right else 1


if __name__ == "__main__":
    sys.exit(main())
