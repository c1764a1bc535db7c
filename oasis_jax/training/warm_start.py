"""A run that starts from parameters that are there already, another run's or a pretrained model's: step, optimizer,
random key and data are its own.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from oasis_jax.config import METHOD_FIELDS, Config, ModelConfig
from oasis_jax.data import Tokenizer
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import parameter_shapes
from oasis_jax.placement import place
from oasis_jax.pretrained.source import is_hub_name
from oasis_jax.storage import as_path, is_remote, reach
from oasis_jax.training.checkpoints import Checkpoints
from oasis_jax.training.description import differing_fields, stored_config, stored_tokenizer
from oasis_jax.training.optimizer import at_step
from oasis_jax.training.state import placed
from oasis_jax.training.workdir import readable

# What of a model is a run's own when it starts from a pretrained one: the method, its start, and how it is computed.
_OWN = {
    *METHOD_FIELDS, "preset", "null_keys", "null_bias", "null_weight", "null_value_weight", "fixed_beta", "alpha_gate",
    "sum_preserving", "recency_bias_init", "router_init_std", "residual_clip", "dtype", "remat", "stack",
    "attention_implementation",
    "depth_implementation",
}  # fmt: skip


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      what: in words.
      model: its config.
      tokenizer: what it reads.
      begin: the token that its texts begin with; None: they begin without one.
      read: (config of the run, {name: parameter where it will lie}) -> the parameters it has of them, in float32.
      complete: whether it has to have all of them; the others start as those of a new run.
    """

    what: str
    model: ModelConfig
    tokenizer: Tokenizer | None
    begin: int | None
    read: Callable[[Config, Mapping[str, Any]], Mapping[str, Any]]
    complete: bool


def is_pretrained(source: str) -> bool:
    """Whether run.init_from names a pretrained model, here or on a hub, not a workdir."""
    if not source:
        return False
    path = as_path(source, "run.init_from")
    if is_remote(path):
        return reach(path, "run.init_from") == "file" or (path / "config.json").exists()
    return path.is_file() or (path / "config.json").is_file() or (not path.exists() and is_hub_name(source))


def with_source(config: Config, workdir: str | os.PathLike[str] | None = None) -> Config:
    """The config of a run with the sizes of the pretrained model that it starts from, where it does.

    Fields of the model that were left at their defaults are the source's; the method and how it is computed are the
    run's.

    Args:
      config: of the run.
      workdir: a run there that began with the same source says what its model is; the source may be gone.

    Raises:
      UserError: the source cannot be read, or a field asks for something else than it is.
    """
    source = _model_in(workdir, config) if workdir and config.run.init_from else None
    if source is None:
        if not is_pretrained(config.run.init_from):
            return config
        from oasis_jax.pretrained.load import source_model  # here: what reads files is not needed where nothing is read
        from oasis_jax.pretrained.source import open_source

        source = started(source_model(open_source(config.run.init_from)), config)
    default, found = ModelConfig(), {}
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


def started(model: ModelConfig, config: Config) -> ModelConfig:
    """The model that a run gets from its source, with the null that run.init_null gives it."""
    if config.run.init_null == "one_per_cent":
        return dataclasses.replace(model, normalizer="learned_sink")
    if config.run.init_null != "transplant":
        return model
    from oasis_jax.pretrained.transplant import transplanted

    return transplanted(model, 1)


def _model_in(workdir: str | os.PathLike[str], config: Config) -> ModelConfig | None:
    """The model of the run in a workdir, where it began with what this one asks for."""
    workdir = readable(workdir, "--workdir")
    if not (workdir / "checkpoints").is_dir():
        return None
    with Checkpoints(workdir, keep=None, say=lambda _: None) as checkpoints:
        if not checkpoints.steps():
            return None
        stored = checkpoints.first_whole(lambda step: stored_config(checkpoints.metadata(step)), checkpoints.steps())[0]
    same = (stored.run.init_from, stored.run.init_null) == (config.run.init_from, config.run.init_null)
    pretrained = stored.data.tokenizer == "library" or is_pretrained(config.run.init_from)
    return stored.model if same and pretrained else None


@contextlib.contextmanager
def starting_point(config: Config, say: Callable[[str], None]) -> Iterator[Start]:
    """The newest whole checkpoint of the run, or the pretrained model, in `config.run.init_from`.

    Raises:
      UserError: there is no such thing, or its model reads another kind of tokens than `config.data` has.
    """
    if is_pretrained(config.run.init_from):
        yield _checked(_pretrained(config.run.init_from), config)
        return
    workdir = readable(config.run.init_from, "run.init_from")
    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"run.init_from: there is no run in {str(workdir)!r} (it has no folder 'checkpoints'), and no "
            "pretrained model (no config.json)"
        )
    if config.run.init_null == "transplant":  # the positions of its model change, which a run of its own kind keeps
        raise UserError(
            f"run.init_null: transplant starts from a pretrained model, and {str(workdir)!r} is a run; write it with "
            "oasis_jax export and start from that"
        )
    with Checkpoints(workdir, keep=None, say=say) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"run.init_from: the run in {str(workdir)!r} has no checkpoint yet")
        (step, metadata), _ = checkpoints.first_whole(
            lambda step: (step, checkpoints.metadata(step)), checkpoints.steps()
        )

        def read(_, abstract):
            own = _named(abstract, parameter_shapes(there.model))
            return checkpoints.first_whole(lambda step: checkpoints.params(step, own), [step])[0]

        there, tokenizer = at_step(stored_config(metadata), step), stored_tokenizer(metadata)
        begin = tokenizer.begin_id if tokenizer and there.data.begin_token else None
        yield _checked(Start(f"step {step} in {checkpoints.folder}", there.model, tokenizer, begin, read, True), config)


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
    tokenizer, begin = source_tokenizer(files, model)

    def read(config: Config, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        return load_params(files, dataclasses.replace(model, dtype="float32"), place(config, mesh))

    return Start(source, model, tokenizer, begin, read, complete=False)


def starting_parameters(
    start: Start,
    config: Config,
    initial: Mapping[str, Any],
    examples: Callable[[int], Mapping[str, np.ndarray]],
    say: Callable[[str], None],
) -> Mapping[str, Any]:
    """The parameters of a run's first state, laid out as `initial` is; says how the two models differ where their
    parameters do not, and how far the run's first model is from the one it starts from.

    Args:
      config: the new run, its model with its vocabulary or vector size.
      initial: the parameters of a new run, of which a pretrained model leaves those that it lacks: routers, nulls.
      examples: (how many) -> a batch of so many, the same in every process.

    Raises:
      UserError: a parameter has another shape there, or is only in one of the two models; a null that cannot start as
        asked for.
    """
    from oasis_jax.pretrained.load import Pretrained
    from oasis_jax.training.retrofit import difference, in_words, rows_to_compare, with_null

    plain = dataclasses.replace(config.run, init_null="none")
    there = dataclasses.replace(config, model=started(start.model, config), run=plain)
    differing = [text for text in differing_fields(config, there) if text.startswith("model.")]
    _check_shapes(start, there.model, config.model, differing)
    abstract = jax.tree.map(lambda x: placed(x, x.sharding), initial)
    placement = place(config, jax.tree.leaves(abstract)[0].sharding.mesh)
    source = Pretrained(
        dataclasses.replace(start.model, dtype="float32"),
        start.read(config, abstract),
        placement,
        start.tokenizer,
        start.begin,
    )
    unlike = f"; the model is another one: {'; '.join(differing)}" if differing else ""
    say(f"starts from the parameters of {start.what}{unlike}")
    batch = examples(rows_to_compare(config, placement))
    found = with_null(source, config, batch)
    params = found if start.complete else _filled(initial, found)
    say(in_words(difference(source, params, at_step(config, 0), batch)))
    return params


def _filled(initial: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _filled(value, found.get(name, {})) if isinstance(value, Mapping) else _same(value, found.get(name))
        for name, value in initial.items()
    }


def _named(tree: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The part of nested dicts that others have, too."""
    return {name: _named(tree[name], x) if isinstance(x, Mapping) else tree[name] for name, x in names.items()}


def _same(initial: Array, found: Array | None) -> Array:
    return initial if found is None else jax.device_put(found, initial.sharding)


def _check_shapes(start: Start, there: ModelConfig, here: ModelConfig, differing: list[str]) -> None:
    there, here = _shapes(there), _shapes(here)
    for name in {**there, **here}:
        if there.get(name) != here.get(name) and (start.complete or name in there):
            what = [f"shape {shapes[name]}" if name in shapes else "no such array" for shapes in (there, here)]
            why = f" ({'; '.join(differing)})" if differing else ""
            raise UserError(f"run.init_from: parameter {name}: {what[0]} in {start.what}, {what[1]} in this model{why}")


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(model))
    return {".".join(str(key.key) for key in path): x.shape for path, x in leaves}
