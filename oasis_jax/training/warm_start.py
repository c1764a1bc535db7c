"""A run that starts from another's parameters, as fine-tuning does: step, optimizer, random key and data are
its own.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from oasis_jax.config import Config, ModelConfig
from oasis_jax.data import Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.training.checkpoints import Checkpoints, differing_fields, stored_config, stored_tokenizer
from oasis_jax.training.state import abstract_state


class Start(NamedTuple):
    """The checkpoint that a run starts from."""

    checkpoints: Checkpoints
    step: int
    config: Config
    tokenizer: Tokenizer | None


@contextlib.contextmanager
def starting_point(config: Config, say: Callable[[str], None]) -> Iterator[Start]:
    """The newest whole checkpoint of the run in `config.run.init_from`.

    Raises:
      UserError: there is no such run or checkpoint, or its model reads another kind of tokens than `config.data` has.
    """
    workdir = pathlib.Path(config.run.init_from)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"run.init_from: there is no run in {str(workdir)!r} (it has no folder 'checkpoints')")
    with Checkpoints(workdir, keep=None, say=say) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"run.init_from: the run in {str(workdir)!r} has no checkpoint yet")
        (step, metadata), _ = checkpoints.first_whole(
            lambda step: (step, checkpoints.metadata(step)), checkpoints.steps()
        )
        tokenizer = stored_tokenizer(metadata)
        if tokenizer and tokenizer.kind != config.data.tokenizer:
            raise UserError(
                f"data.tokenizer: {config.data.tokenizer} asked for, but the model in run.init_from reads "
                f"{tokenizer.kind}; take that"
            )
        yield Start(checkpoints, step, stored_config(metadata), tokenizer)


def starting_parameters(start: Start, config: Config, mesh: Mesh, say: Callable[[str], None]) -> dict:
    """The checkpoint's parameters, bitwise, laid out for `mesh`; says how the two models differ where their
    parameters do not.

    Args:
      config: the new run, its model with its vocabulary or vector size.

    Raises:
      UserError: a parameter has another shape there, or is only in one of the two models.
    """
    differing = [text for text in differing_fields(config, start.config) if text.startswith("model.")]
    _check_shapes(start, config.model, differing)
    abstract = abstract_state(config, mesh).params
    params, _ = start.checkpoints.first_whole(lambda step: start.checkpoints.params(step, abstract), [start.step])
    unlike = f"; the model is another one: {'; '.join(differing)}" if differing else ""
    say(f"starts from the parameters of step {start.step} in {start.checkpoints.folder}{unlike}")
    return params


def _check_shapes(start: Start, model: ModelConfig, differing: list[str]) -> None:
    there, here = _shapes(start.config.model), _shapes(model)
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            what = [f"shape {shapes[name]}" if name in shapes else "no such array" for shapes in (there, here)]
            why = f" ({'; '.join(differing)})" if differing else ""
            raise UserError(
                f"run.init_from: parameter {name}: {what[0]} in {start.checkpoints.folder}, {what[1]} in this "
                f"model{why}"
            )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(model))
    return {".".join(str(key.key) for key in path): x.shape for path, x in leaves}
