"""A run that starts from parameters that are there already, another run's or a pretrained model's: step, optimizer,
random key and data are its own.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from oasis_jax.config import METHOD_FIELDS, Config, ModelConfig
from oasis_jax.data import Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.placement import place
from oasis_jax.training.checkpoints import Checkpoints, differing_fields, stored_config, stored_tokenizer
from oasis_jax.training.state import placed

# What of a model is a run's own when it starts from a pretrained one: the method, and how it is computed.
_OWN = {
    *METHOD_FIELDS, "preset", "null_keys", "residual_clip", "dtype", "remat", "stack", "attention_implementation",
    "depth_implementation",
}  # fmt: skip


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      what: in words.
      model: its config.
      tokenizer: what it reads.
      read: (config of the run, {name: parameter where it will lie}) -> the parameters it has of them, in float32.
      complete: whether it has to have all of them; the others start as those of a new run.
    """

    what: str
    model: ModelConfig
    tokenizer: Tokenizer | None
    read: Callable[[Config, Mapping[str, Any]], Mapping[str, Any]]
    complete: bool


def is_pretrained(source: str) -> bool:
    """Whether run.init_from names a pretrained model, not a workdir."""
    path = pathlib.Path(source)
    return bool(source) and (path.is_file() or (path / "config.json").is_file())


def with_source(config: Config) -> Config:
    """The config of a run with the sizes of the pretrained model that it starts from, where it does.

    Fields of the model that were left at their defaults are the source's; the method and how it is computed are the
    run's.

    Raises:
      UserError: the source cannot be read, or a field asks for something else than it is.
    """
    if not is_pretrained(config.run.init_from):
        return config
    from oasis_jax.pretrained.load import source_model  # here: what reads files is not needed where nothing is read
    from oasis_jax.pretrained.source import open_source

    source, default, found = source_model(open_source(config.run.init_from)), ModelConfig(), {}
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        if name in _OWN:
            continue
        asked, there = getattr(config.model, name), getattr(source, name)
        if asked not in (there, getattr(default, name)):
            raise UserError(
                f"model.{name}: {asked!r} asked for, but the model in run.init_from has {there!r}; leave it out"
            )
        found[name] = there
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))


@contextlib.contextmanager
def starting_point(config: Config, say: Callable[[str], None]) -> Iterator[Start]:
    """The newest whole checkpoint of the run, or the pretrained model, in `config.run.init_from`.

    Raises:
      UserError: there is no such thing, or its model reads another kind of tokens than `config.data` has.
    """
    if is_pretrained(config.run.init_from):
        yield _checked(_pretrained(config.run.init_from), config)
        return
    workdir = pathlib.Path(config.run.init_from)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"run.init_from: there is no run in {str(workdir)!r} (it has no folder 'checkpoints'), and no "
            "pretrained model "
            "(no config.json)"
        )
    with Checkpoints(workdir, keep=None, say=say) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"run.init_from: the run in {str(workdir)!r} has no checkpoint yet")
        (step, metadata), _ = checkpoints.first_whole(
            lambda step: (step, checkpoints.metadata(step)), checkpoints.steps()
        )

        def read(_, abstract):
            return checkpoints.first_whole(lambda step: checkpoints.params(step, abstract), [step])[0]

        what = f"step {step} in {checkpoints.folder}"
        start = Start(what, stored_config(metadata).model, stored_tokenizer(metadata), read, complete=True)
        yield _checked(start, config)


def _checked(start: Start, config: Config) -> Start:
    kind = start.tokenizer and start.tokenizer.kind
    if kind and kind != config.data.tokenizer:
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer} asked for, but the model in run.init_from reads {kind}; take that"
        )
    if not kind and config.data.tokenizer == "library":
        raise UserError("data.tokenizer: library asked for, but the model in run.init_from comes without a tokenizer")
    return start


def _pretrained(source: str) -> Start:
    from oasis_jax.pretrained.load import source_model, source_tokenizer
    from oasis_jax.pretrained.source import open_source
    from oasis_jax.pretrained.tensors import load_params

    files = open_source(source)
    model = source_model(files)
    tokenizer, _ = source_tokenizer(files, model)

    def read(config: Config, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        return load_params(files, dataclasses.replace(model, dtype="float32"), place(config, mesh))

    return Start(source, model, tokenizer, read, complete=False)


def starting_parameters(
    start: Start, config: Config, initial: Mapping[str, Any], say: Callable[[str], None]
) -> Mapping[str, Any]:
    """The parameters of a run's first state, laid out as `initial` is; says how the two models differ where their
    parameters do not.

    Args:
      config: the new run, its model with its vocabulary or vector size.
      initial: the parameters of a new run, of which a pretrained model leaves those that it lacks: routers, nulls.

    Raises:
      UserError: a parameter has another shape there, or is only in one of the two models.
    """
    there = dataclasses.replace(config, model=start.model)
    differing = [text for text in differing_fields(config, there) if text.startswith("model.")]
    _check_shapes(start, config.model, differing)
    abstract = jax.tree.map(lambda x: placed(x, x.sharding), initial)
    found = start.read(config, abstract)
    unlike = f"; the model is another one: {'; '.join(differing)}" if differing else ""
    say(f"starts from the parameters of {start.what}{unlike}")
    return found if start.complete else _filled(initial, found)


def _filled(initial: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _filled(value, found.get(name, {})) if isinstance(value, Mapping) else _same(value, found.get(name))
        for name, value in initial.items()
    }


def _same(initial: Array, found: Array | None) -> Array:
    return initial if found is None else jax.device_put(found, initial.sharding)


def _check_shapes(start: Start, model: ModelConfig, differing: list[str]) -> None:
    there, here = _shapes(start.model), _shapes(model)
    for name in {**there, **here}:
        if there.get(name) != here.get(name) and (start.complete or name in there):
            what = [f"shape {shapes[name]}" if name in shapes else "no such array" for shapes in (there, here)]
            why = f" ({'; '.join(differing)})" if differing else ""
            raise UserError(f"run.init_from: parameter {name}: {what[0]} in {start.what}, {what[1]} in this model{why}")


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(model))
    return {".".join(str(key.key) for key in path): x.shape for path, x in leaves}
