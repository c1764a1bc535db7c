"""One optimizer step and one look at the model's statistics, compiled for a mesh."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from oasis_jax.config import Config, ModelConfig
from oasis_jax.model.batch import without_ignored
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import check_inputs
from oasis_jax.model.head import embed, with_offset
from oasis_jax.model.layout import stack_layers, unstack_layers
from oasis_jax.model.loop import run_loop, uses_loop
from oasis_jax.model.norms import norm
from oasis_jax.model.router import coupling_strength
from oasis_jax.model.statistics import layer_telemetry, telemetry
from oasis_jax.model.unrolled import run_unrolled
from oasis_jax.model.wiring import schedule
from oasis_jax.placement import Placement, check_batch_size, place
from oasis_jax.training.loss import mean_loss, total_weight
from oasis_jax.training.optimizer import gradient_norm, learning_rate, make_optimizer, null_weights
from oasis_jax.training.state import TrainState, abstract_state, shardings_of

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def make_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step(state, batch) -> (state, metrics); the state that goes in is given up.

    Args:
      config: the run; its model has its vocabulary or vector size.
      mesh: as `make_mesh` builds it.

    Returns:
      A function of the state and of a batch of global arrays [B, T, ...] ("inputs", "targets", "weights" and, where an
      example holds several documents, "segment_ids"). Targets of -100 and weights of 0 count nothing. Its metrics are
      float32 scalars: "loss" (the weighted mean over the batch), "grad_norm" (before clipping), "parameter_norm" (after
      the update), "learning_rate" and, with optimizer.nonfinite=skip, "skipped": 1 where loss or gradient were not
      finite and parameters and moments stayed as they were.

    Raises:
      UserError: the batch or the model cannot be split over the mesh.
    """
    shardings, placement = shardings_of(abstract_state(config, mesh)), place(config, mesh)
    check_batch_size(config, placement)
    return jax.jit(
        partial(_step, config=config, shardings=shardings, placement=placement),
        in_shardings=(shardings, placement.sharding(("batch",))),
        out_shardings=(shardings, placement.sharding()),
        donate_argnums=0,
    )


def make_telemetry(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], Metrics]:
    """The compiled telemetry(state, batch) -> `oasis_jax.model.statistics.telemetry` of a forward pass.

    A function of its own, so that looking at a run at other intervals, or never, changes no bit of it.
    """
    shardings, placement = shardings_of(abstract_state(config, mesh)), place(config, mesh)
    return jax.jit(
        partial(_telemetry, config=config, placement=placement),
        in_shardings=(shardings, placement.sharding(("batch",))),
        out_shardings=placement.sharding(),
    )


def _step(
    state: TrainState, batch: Batch, *, config: Config, shardings: TrainState, placement: Placement
) -> tuple[TrainState, Metrics]:
    loss, gradients = loss_and_gradients(state.params, batch, config, placement, null_weights(config, state.step))
    gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
    optimizer = make_optimizer(config.optimizer, config.run.steps, config.model)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    skipped = {}
    if config.optimizer.nonfinite == "skip":
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
        keep = lambda new, old: jnp.where(finite, new, old)
        params, opt_state = jax.tree.map(keep, params, state.params), jax.tree.map(keep, opt_state, state.opt_state)
        skipped = {"skipped": 1.0 - finite.astype(jnp.float32)}
    metrics = {
        "loss": loss,
        "grad_norm": gradient_norm(gradients, config.model),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": learning_rate(config.optimizer, config.run.steps)(state.step),
    } | skipped
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def _runs_as_loop(config: ModelConfig, placement: Placement) -> bool:
    platform = jax.default_backend() if placement.mesh is None else placement.mesh.devices.flat[0].platform
    return uses_loop(config, platform)


def _start(
    params: dict, batch: Batch, config: ModelConfig, placement: Placement, null: Mapping[str, Array]
) -> tuple[Array, Context]:
    """The embedding, and the context of the layers."""
    inputs = batch["inputs"]
    check_inputs(config, inputs)
    documents = dict(positions=batch.get("positions"), segment_ids=batch.get("segment_ids"))
    context = Context(**documents, **null, placement=placement)
    context.check(*inputs.shape[:2])
    return embed(params, config, inputs, context), with_offset(config, context, inputs.shape[1])


def training_loss(
    params: dict,
    batch: Batch,
    config: ModelConfig,
    placement: Placement,
    total: Array | None = None,
    null: Mapping[str, Array] = MappingProxyType({}),
    *,
    loop: bool,
) -> Float[Array, ""]:
    """The mean loss of a batch, with the layers as a loop or one by one; equal values and gradients.

    Args:
      params: stacked for a loop, otherwise either layout; see `oasis_jax.model.layout`.
      batch: in the order of the devices; see `Placement.ordered`.
      config: of the model.
      placement: see Placement.
      total: see `mean_loss`.
      null: see `oasis_jax.training.optimizer.null_weights`.
      loop: which executor runs the layers.
    """
    embedding, context = _start(params, batch, config, placement, null)
    run = run_loop if loop else run_unrolled
    final = norm(params.get("final_norm", {}), config, run(params, config, embedding, context).stream)
    return mean_loss(params, config, final, batch, context, total)


def loss_and_gradients(
    params: dict,
    batch: Batch,
    config: Config,
    placement: Placement,
    null: Mapping[str, Array] = MappingProxyType({}),
) -> tuple[Array, dict]:
    """Those of the whole batch, one micro-batch after the other: each gives its part of the whole, and parts add up.

    Parameters and gradients are stacked. One by one, layers have gradients of their own, stacked once at the end: that
    of a slice would be as large as all layers', for each of them.
    """
    batch, loop = placement.ordered(without_ignored(batch)), _runs_as_loop(config.model, placement)
    total = total_weight(batch)
    params = params if loop else unstack_layers(params)
    stacked = (lambda gradients: gradients) if loop else stack_layers

    def loss(params, micro_batch):
        return training_loss(params, micro_batch, config.model, placement, total, null, loop=loop)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, micro_batch)), None

    if config.optimizer.accumulation_steps == 1:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return value, stacked(gradients)
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    value, gradients = jax.lax.scan(add, zeros, _micro_batches(batch, config, placement))[0]
    return value, stacked(gradients)


def _telemetry(state: TrainState, batch: Batch, *, config: Config, placement: Placement) -> Metrics:
    params, batch = state.params, placement.ordered(batch)

    def look(micro_batch):
        embedding, context = _start(params, micro_batch, config.model, placement, null_weights(config, state.step))
        if _runs_as_loop(config.model, placement):
            return run_loop(params, config.model, embedding, context, telemetry=True).layers
        seen = run_unrolled(
            params, config.model, embedding, context, on_layer=lambda _, layer: layer_telemetry(layer.attention)
        ).layers
        return jax.tree.map(lambda *x: jnp.stack(x), *seen)

    if config.optimizer.accumulation_steps == 1:
        layers = look(batch)
    else:  # micro-batches are equally large, and telemetry is not weighted
        layers = jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(look, _micro_batches(batch, config, placement)))
    betas = {}
    if "beta_raw" in params.get("routers", {}):
        strengths = coupling_strength(params["routers"]["beta_raw"])
        betas = {name: strengths[i] for i, name in enumerate(schedule(config.model).routers)}
    return telemetry(layers, betas)


def _micro_batches(batch: Batch, config: Config, placement: Placement) -> Batch:
    """[B, ...] -> [steps, B / steps, ...]. Micro-batch i takes the rows i, i + steps, ...: every device its
    own rows.
    """
    steps = config.optimizer.accumulation_steps

    def split(x):
        x = x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)
        return placement.constrain(x, (None, "batch", "length", *(None,) * (x.ndim - 3)))

    return jax.tree.map(split, batch)
