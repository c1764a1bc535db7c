"""A trained run as those that measure or use it need it: from its checkpoint alone, on whatever mesh there is."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax

from oasis_jax.config import Config, MeshConfig
from oasis_jax.data import Tokenizer
from oasis_jax.errors import UserError, printable
from oasis_jax.model.decoder import Decoder, parameter_shapes
from oasis_jax.overrides import apply_overrides, parse_overrides
from oasis_jax.placement import Placement, make_mesh, place
from oasis_jax.training.checkpoints import Checkpoints
from oasis_jax.training.description import MAY_DIFFER, stored_config, stored_tokenizer
from oasis_jax.training.limits import check_parameters
from oasis_jax.training.optimizer import at_step
from oasis_jax.training.state import build_model, parameter_shardings, placed
from oasis_jax.training.workdir import readable

# What may be another than in the checkpoint: how a model is computed, where its data lie; never what it computes.
HOW = sorted(name for name in MAY_DIFFER if name.startswith(("model.", "mesh.", "data.")))


class LoadedRun(NamedTuple):
    """A trained model and what it was made from, from a checkpoint alone.

    params: stacked, as `placement` lays them out; config: with the mesh that they lie on.
    """

    params: dict
    placement: Placement
    config: Config
    tokenizer: Tokenizer | None
    corpus_identity: dict
    versions: dict[str, str]
    step: int

    @property
    def model(self) -> Decoder:
        """An NNX Decoder with parameters of its own."""
        return build_model(self.config.model, self.params)


def measured_otherwise(config: Config, overrides: Iterable[str]) -> Config:
    """The config of a trained run on a mesh of its own, all devices splitting the batch where nothing else is asked
    for.

    Args:
      overrides: "section.field=value" of how a model is computed and where its data lie, see `HOW`.

    Raises:
      UserError: a field that says what the run is, or a value that does not fit.
    """
    overrides = list(overrides)
    for section, values in parse_overrides(overrides).items():
        for name in values:
            if f"{section}.{name}" not in HOW:
                raise UserError(
                    f"--set: {section}.{name} is part of what was trained and stays as it is; allowed: {', '.join(HOW)}"
                )
    return apply_overrides(dataclasses.replace(config, mesh=MeshConfig(rules=config.mesh.rules)), overrides)


def load_run(workdir: str | os.PathLike[str], step: int | None = None, *, overrides: Iterable[str] = ()) -> LoadedRun:
    """A run's parameters, from its checkpoint alone, read straight into their shards.

    Args:
      workdir: where it was trained.
      step: which checkpoint; None: the newest whole one.
      overrides: see `measured_otherwise`.

    Raises:
      UserError: there is no such checkpoint, or no whole one, or this version cannot build its model, or not on this
        mesh.
    """
    workdir = readable(workdir, "--workdir")
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir: there is no run in {str(workdir)!r} (it has no folder 'checkpoints')")
    with Checkpoints(workdir, keep=None, say=lambda text: print(printable(text), file=sys.stderr)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"--workdir: the run in {str(workdir)!r} has no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(
                f"step {step}: {str(workdir)!r} has no such checkpoint; allowed: {', '.join(map(str, steps))}"
            )

        def restore(step: int) -> LoadedRun:
            metadata = checkpoints.metadata(step)
            config = at_step(measured_otherwise(stored_config(metadata), overrides), step)
            mesh = make_mesh(config.mesh)
            try:
                check_parameters(config.model, mesh)
            except UserError as error:
                raise UserError(f"{workdir}: checkpoint {step}: {error}") from None
            placement = place(config, mesh)
            shardings = parameter_shardings(config.model, placement)
            params = checkpoints.params(step, jax.tree.map(placed, parameter_shapes(config.model), shardings))
            tokenizer, corpus = stored_tokenizer(metadata), metadata["corpus"]
            return LoadedRun(params, placement, config, tokenizer, corpus, metadata["versions"], step)

        return checkpoints.first_whole(restore, steps if step is None else [step])[0]
