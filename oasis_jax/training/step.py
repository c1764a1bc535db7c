"""One optimizer step and one look at the model's statistics, compiled for a mesh."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from oasis_jax.config import Config, ModelConfig
from oasis_jax.model import statistics
from oasis_jax.model.decoder import with_parameters
from oasis_jax.model.layout import stack_layers, unstack_layers
from oasis_jax.model.norms import norm
from oasis_jax.model.scanned import final_stream, uses_scan
from oasis_jax.training.loss import chunked_mean_loss, total_weight
from oasis_jax.training.optimizer import learning_rate, make_optimizer
from oasis_jax.training.sharding import Placement, batch_sharding, placement, replicated
from oasis_jax.training.state import TrainState, abstract_state, build_model, shardings_of

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def make_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step(state, batch) -> (state, metrics); the state that goes in is given up.

    Args:
      config: the run; its model has its vocabulary or vector size.
      mesh: as `make_mesh` builds it.

    Returns:
      A function of the state and of a batch of global arrays [B, T, ...] ("inputs", "targets", "weights" and, where an
      example holds several documents, "segment_ids"). Its metrics are float32 scalars: "loss" (the weighted mean over
      the batch), "grad_norm" (before clipping), "parameter_norm" (after the update), "learning_rate" and, with
      optimizer.nonfinite=skip, "skipped": 1 where loss or gradient were not finite and parameters and moments stayed as
      they were.

    Raises:
      UserError: the batch or the model cannot be split over the mesh.
    """
    shardings = shardings_of(abstract_state(config, mesh))
    scan = uses_scan(config.model, mesh.devices.flat[0].platform)
    return jax.jit(
        partial(_step, config=config, shardings=shardings, pin=placement(config, mesh), scan=scan),
        in_shardings=(shardings, batch_sharding(config, mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_telemetry(config: Config, mesh: Mesh) -> Callable[[dict, Batch], Metrics]:
    """The compiled telemetry(params, batch) -> `oasis_jax.model.statistics.telemetry` of a forward pass.

    A function of its own, so that looking at a run at other intervals, or never, changes no bit of it.
    """
    shardings = shardings_of(abstract_state(config, mesh).params)
    return jax.jit(
        partial(_telemetry, config=config, pin=placement(config, mesh)),
        in_shardings=(shardings, batch_sharding(config, mesh)),
        out_shardings=replicated(mesh),
    )


def _step(
    state: TrainState, batch: Batch, *, config: Config, shardings: TrainState, pin: Placement, scan: bool
) -> tuple[TrainState, Metrics]:
    loss, gradients = _loss_and_gradients(state.params, batch, config, pin, scan)
    gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
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
        "grad_norm": optax.tree.norm(gradients),
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": learning_rate(config.optimizer, config.run.steps)(state.step),
    } | skipped
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def training_loss(
    params: dict, batch: Batch, config: ModelConfig, pin: Placement, total: Array | None = None, *, scan: bool
) -> Array:
    """The mean loss of a batch, with the layers as loops (`scan`) or one by one; equal values and gradients.

    Args:
      params: stacked for loops, otherwise layer by layer; see `oasis_jax.model.layout`.
      total: see `mean_loss`.
    """
    segment_ids = batch.get("segment_ids")
    if scan:
        stream = final_stream(params, config, batch["inputs"], segment_ids=segment_ids, constrain=pin)
        final = norm(params.get("final_norm", {}), config, stream)
    else:
        final = with_parameters(config, params)(batch["inputs"], segment_ids=segment_ids, constrain=pin)[1].taps[
            "final_norm"
        ][0]
    return chunked_mean_loss(params["ends"], final, batch, config, pin, total)


def _loss_and_gradients(params: dict, batch: Batch, config: Config, pin: Placement, scan: bool) -> tuple[Array, dict]:
    """Those of the whole batch, one micro-batch after the other: each gives its part of the whole, and parts add up.

    Parameters and gradients are stacked. One by one, layers have gradients of their own, stacked once at the end: that
    of a slice would be as large as all layers', for each of them.
    """
    batch = pin.ordered(batch)
    total = total_weight(batch)
    params = params if scan else unstack_layers(params)
    stacked = (lambda gradients: gradients) if scan else stack_layers

    def loss(params, micro_batch):
        return training_loss(params, micro_batch, config.model, pin, total, scan=scan)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, micro_batch)), None

    if config.optimizer.accumulation_steps == 1:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return value, stacked(gradients)
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    value, gradients = jax.lax.scan(add, zeros, _micro_batches(batch, config, pin))[0]
    return value, stacked(gradients)


def _telemetry(params: dict, batch: Batch, *, config: Config, pin: Placement) -> Metrics:
    batch = pin.ordered(batch)

    def look(micro_batch):
        model = build_model(config.model, params)
        _, seen = model(micro_batch["inputs"], segment_ids=micro_batch.get("segment_ids"), constrain=pin)
        return statistics.telemetry(seen)

    if config.optimizer.accumulation_steps == 1:
        return look(batch)
    # Micro-batches are equally large, and telemetry is not weighted.
    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(look, _micro_batches(batch, config, pin)))


def _micro_batches(batch: Batch, config: Config, pin: Placement) -> Batch:
    """[B, ...] -> [steps, B / steps, ...]. Micro-batch i takes the rows i, i + steps, ...: every device keeps
    its own rows.
    """
    steps = config.optimizer.accumulation_steps

    def deal(x):
        dealt = x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)
        return pin(dealt, (None, "batch", "length", *(None,) * (x.ndim - 2)))

    return jax.tree.map(deal, batch)
