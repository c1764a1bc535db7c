"""The measures for somebody else's model: a function, its parameters, batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from jaxtyping import Array

from oasis_jax.errors import UserError
from oasis_jax.evaluation.evaluator import Batch, Measurements
from oasis_jax.evaluation.measures.table import choose
from oasis_jax.evaluation.passes import FunctionPass, checked_batches, run_evaluators
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics, Statistics
from oasis_jax.model.unrolled import LayerStatistics


def as_statistics(found: Statistics | AttentionStatistics | Sequence[AttentionStatistics]) -> Statistics:
    """What a model said about itself as `Statistics`; a list of attention layers says nothing about routers
    and taps.
    """
    if isinstance(found, Statistics):
        return found
    layers = [found] if isinstance(found, AttentionStatistics) else list(found)
    for number, layer in enumerate(layers):
        if not isinstance(layer, AttentionStatistics):
            raise UserError(
                "measure: apply_fn has to return outputs, or (outputs, statistics) with the statistics an "
                "oasis_jax.Statistics or a "
                f"list of oasis_jax.AttentionStatistics, got {type(layer).__name__} among them"
            )
        queries, keys = layer.query.shape[1], layer.key.shape[1]
        if queries != keys:
            raise UserError(
                f"measure: attention layer {number} has {queries} queries and {keys} keys; only self-attention without "
                "a cache is measured: leave it out"
            )
    return Statistics(layers, {}, {})


def parts(
    found: Statistics | AttentionStatistics | Sequence[AttentionStatistics],
) -> tuple[list[LayerStatistics], Mapping[str, RouterStatistics], Array | None]:
    """Of every layer, of routers by name, the final norm's output; None where the model says nothing."""
    attention, routers, taps = as_statistics(found)
    kinds = [taps.get(kind, []) for kind in LayerStatistics._fields if kind != "attention"]
    final = taps.get("final_norm") or [None]
    return [LayerStatistics(*layer) for layer in zip_longest(attention, *kinds)], routers, final[0]


def measure(
    apply_fn: Callable[..., Any], params: Any, batches: Iterable[Batch], *, measures: Iterable[str] = ("default",)
) -> Measurements:
    """Measures any JAX model whose attention is this library's, with or without its stack and routers.

    Args:
      apply_fn: (params, inputs) -> outputs [B, T, V], or (outputs, statistics): the `oasis_jax.AttentionStatistics` of
        its attention layers as a list, or an `oasis_jax.Statistics` with routers by name and taps by kind, as far as
        the model has them. It is called under `jax.jit`, with `segment_ids` too where the batches have them; a layer
        that uses others, or none, is refused.
      params: its parameters, sharded or not.
      batches: dicts of arrays [B, T, ...]: "inputs"; "targets" and optionally "weights" for the loss; "bytes", the
        bytes that each target stands for, for bits per byte; all batches of one shape compile once.
      measures: names of families of measures, see `oasis_jax.evaluation.EVALUATORS`; "default" and "all" stand for
        several.

    Returns:
      Measurements: `values` {name: float, nested lists, or None where the model gives no data for it}, and
      `intervals()`, the confidence interval of each scalar. `oasis_jax.evaluation.DEFINITIONS` says what each value is.

    Raises:
      UserError: an unknown measure, no batch or one that does not fit, or statistics of another kind or of
        cross-attention.
    """
    chosen, batches = choose(measures), checked_batches(batches, "measure")
    return run_evaluators(FunctionPass(apply_fn, parts), params, batches, chosen)
