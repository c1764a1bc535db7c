"""Several processes as one run: JAX's own runtime, started from flags or from what a scheduler says."""

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from oasis_jax.errors import UserError

# A process that is gone is noticed after this long at the latest; the others then end with an error instead of waiting
# for it.
HEARTBEAT_SECONDS = 60
MOST_PROCESSES = 2**16


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other.

    coordinator: "host:port" of process 0; "" with count 0: SLURM, Open MPI, Cloud TPU or GKE say all three.
    """

    coordinator: str = ""
    count: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        if not self.coordinator and not self.count:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 2**16):
            raise UserError(f"--coordinator: expected HOST:PORT of process 0, got {self.coordinator!r}")
        if self.count < 1:
            raise UserError(f"--processes: must be at least 1, got {self.count}")
        if self.count > MOST_PROCESSES:
            raise UserError(f"--processes: must be at most {MOST_PROCESSES}, got {self.count}")
        if not 0 <= self.index < self.count:
            raise UserError(
                f"--process: must lie between 0 and {self.count - 1} for --processes={self.count}, got {self.index}"
            )


def start(processes: Processes) -> None:
    """Joins this process to the run; before anything else uses JAX.

    Raises:
      UserError: the environment says nothing of other processes, or they did not come.
    """
    found = {}
    if processes.coordinator:
        found = dict(
            coordinator_address=processes.coordinator, num_processes=processes.count, process_id=processes.index
        )
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        where = processes.coordinator or "the environment (SLURM, Open MPI, Cloud TPU, GKE)"
        text = " ".join(str(error).split())
        raise UserError(f"--distributed: could not join the run that {where} describes: {text[:200]}") from None


def is_first() -> bool:
    """Whether this is the process that writes logs and tidies folders."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(text: str) -> str:
    """What the first process that has something to say says, in every process; at most 512 bytes of it."""
    if jax.process_count() == 1:
        return text
    mine = np.zeros(512, np.uint8)
    encoded = text.encode()[: len(mine)]
    mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    said = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(mine)]
    return next(filter(None, said), "")


def batch_part(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """(index, count): this process reads part `index` of the `count` parts into which the processes split a batch.

    Processes whose devices hold the same examples (model parallelism across processes) read the same part.

    Raises:
      UserError: processes hold examples that overlap without being the same.
    """
    rows: dict[int, set[int]] = {}
    for device, (examples, *_) in sharding.devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*examples.indices(batch_size)))
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    flat = np.concatenate(parts)
    if len({len(part) for part in parts}) > 1 or len(set(flat.tolist())) != len(flat):
        raise UserError(
            "mesh: processes hold overlapping parts of a batch; let data x fsdp be a multiple or a divisor of the "
            "number of processes"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)
