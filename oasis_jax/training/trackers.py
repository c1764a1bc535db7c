"""Where else the numbers of metrics.jsonl go: TensorBoard files, Weights & Biases."""

import pathlib
import re
import secrets
from collections.abc import Mapping
from typing import Protocol

from oasis_jax.config import Config, to_dict
from oasis_jax.errors import Preempted, UserError

RUN_ID = "wandb_run_id"  # a file of the workdir: a resumed run goes on under the same id


class Tracker(Protocol):
    """What takes the numbers of a run, step by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step."""

    def close(self, error: BaseException | None) -> None:
        """Writes what is left; `error` is what ended the run, None where nothing did."""


class TensorBoard:
    """Event files in workdir/tensorboard."""

    def __init__(self, workdir: pathlib.Path, step: int):
        """Continues after `step`: what files say of later steps is left out by readers.

        Raises:
          UserError: tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "tensorboardX") from None
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, error: BaseException | None) -> None:
        del error
        self._writer.close()


class Wandb:
    """A run of Weights & Biases with the config of this one. Project, name, entity and mode (WANDB_MODE=offline) are
    those of wandb's own environment variables and settings; its files lie in workdir/wandb.

    Steps that a resumed run does again are the ones it had done, bit by bit: wandb keeps the first.
    """

    def __init__(self, workdir: pathlib.Path, config: Config):
        """Starts the run, or goes on with the one of this workdir.

        Raises:
          UserError: wandb is not installed, not logged in, does not reach its server, or refuses its settings.
        """
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        settings = dict(dir=str(workdir), id=_run_id(workdir), resume="allow", config=to_dict(config))
        try:
            # The console is this program's: wandb would read along.
            self._run = wandb.init(**settings, settings=wandb.Settings(console="off"))
        except (wandb.errors.Error, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"run.wandb: {reason}; `wandb login`, WANDB_MODE=offline for files alone, or set it to false"
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, error: BaseException | None) -> None:
        if isinstance(error, Preempted):
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if error is None else 1)


def _run_id(workdir: pathlib.Path) -> str:
    """The id of the workdir's run, made where there is none."""
    path = workdir / RUN_ID
    try:
        if path.exists():
            found = path.read_text().strip()
        else:
            found = secrets.token_hex(8)
            path.write_text(f"{found}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read or written: {getattr(error, 'strerror', None) or error}") from None
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found):
        raise UserError(f"{path}: holds no id of a run: up to 64 letters, digits, - and _; remove it for a new one")
    return found


def _missing(field: str, package: str) -> UserError:
    return UserError(
        f"run.{field}: {package} is not installed; python -m pip install 'oasis_jax[{field}]', or set it to false"
    )
