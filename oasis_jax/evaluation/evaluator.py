"""What a measure is: what it reads of a layer, of a router and of the end of a model, and how rows become values.

The model hands out its statistics as they are made, so that of a layer only rows of a few numbers a sequence outlive
it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import bootstrap
from oasis_jax.evaluation.bootstrap import Estimate, Interval
from oasis_jax.evaluation.measures.probabilities import Probabilities, probabilities
from oasis_jax.model.context import Context
from oasis_jax.model.masks import first_in_document
from oasis_jax.model.statistics import AttentionStatistics, RouterStatistics
from oasis_jax.model.unrolled import LayerStatistics

Batch = Mapping[str, np.ndarray]
Rows = dict[str, Array]
Value = float | list[Any] | dict[str, Any] | None  # None: the measure does not apply to this model or these batches
Identity = dict[str, object]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """What all readings of a batch of B rows of T tokens share.

    Attributes:
      batch: its arrays [B, T, ...] in the order in which the tokens lie on the devices.
      size: how many of the rows count; others fill the batch up.
      context: of the pass.
      has_null: whether the normalizer of some layer may leave mass to a null.
    """

    batch: Mapping[str, Array]
    size: Int[Array, ""]
    context: Context
    has_null: bool

    @property
    def length(self) -> int:
        return self.batch["inputs"].shape[1]

    @property
    def plain(self) -> bool:
        """Whether every row is one document, its tokens in the order of the text."""
        attention = self.context.placement.attention
        return self.context.segment_ids is None and not (attention and attention.layout == "zigzag")

    # Not cached: what is computed in a loop over layers may not leave it.

    @property
    def _first(self) -> Int[Array, "#B T"]:
        return first_in_document(self.context, self.length)

    @property
    def place(self) -> Int[Array, "#B T"]:
        """The place of every token in its own document."""
        order = self.context.order(self.length)
        return order - order[0][self._first]

    @property
    def document_length(self) -> Int[Array, "#B T"]:
        """How many tokens each token's own document has."""
        rows = jnp.arange(len(self._first))[:, None]
        return jnp.zeros_like(self._first).at[rows, self._first].add(1)[rows, self._first]

    def by_place(self, values: Float[Array, "B *middle T"]) -> Float[Array, "B *middle T"]:
        """The sum over a row's documents at every place in the document; see `documents_by_place`."""
        if self.plain:
            return values
        batch = values.shape[0]
        place = jnp.broadcast_to(self.place, (batch, self.length))
        rows = jnp.moveaxis(values, -1, 1)  # [B, T, ...]
        return jnp.moveaxis(jnp.zeros_like(rows).at[jnp.arange(batch)[:, None], place].add(rows), 1, -1)

    @property
    def documents_by_place(self) -> Float[Array, "B T"]:
        """How many of a row's documents reach every place."""
        return self.by_place(jnp.ones(self.batch["inputs"].shape[:2]))

    def in_order(self, values: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """Values of tokens in the order of the text."""
        return values[:, jnp.argsort(self.context.order(self.length)[0])]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerReading:
    """What a measure may look at in a layer; a foreign model's statistics are None where it says nothing."""

    tokens: Tokens
    statistics: LayerStatistics

    @property
    def attention(self) -> AttentionStatistics | None:
        return self.statistics.attention

    @functools.cached_property
    def probabilities(self) -> Probabilities | None:
        """What only the whole rows of the layer's attention tell, read tile by tile once for all measures;
        None where it is not known how they are made.
        """
        if self.attention is None or self.attention.static is None:
            return None
        return probabilities(self.attention, self.tokens.context, None if self.tokens.plain else self.tokens.place)


@dataclasses.dataclass(frozen=True, eq=False)
class FinalReading:
    """What a measure may look at when the last layer is done.

    Attributes:
      final: the final norm's output; None where a foreign model does not give it.
      map_logits: (function, {name: [B, T, ...]}) -> function(logits [.., t, V], {name: [.., t, ...]}) for all
        positions, piece by piece: [B, T, ...]; the logits of all positions never exist. Vectors' outputs likewise.
      config: None for a foreign model.
      gains: of the norm that reads each layer's output.
    """

    tokens: Tokens
    final: Float[Array, "B T D"] | None
    map_logits: Callable[[Callable, Mapping[str, Array]], Any]
    config: ModelConfig | None = None
    gains: Float[Array, "L D"] | None = None


def all_rows(layers: Rows, routers: dict[str, Rows], reading: FinalReading) -> Rows:
    """Of layers "<name>": [B, L, ...]; of routers "<name>/<number>/<router>": [B, ...]."""
    del reading
    found = dict(layers)
    for number, (router, rows) in enumerate(routers.items()):  # rows leave jit in alphabetical order
        found |= {f"{name}/{number:04d}/{router}": values for name, values in rows.items()}
    return found


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evaluator:
    """A family of measures.

    Under jit, `layer`, `router` and `final` reduce what they are shown to rows, {name: array [B, ...]}, or to {} where
    the family does not apply. `combine` gets the rows of all layers, stacked to [B, L, ...], and those of every router,
    when the pass is over. `finish` sees the rows of all sequences in float64 and averages them: an `Estimate` for a
    scalar, a value for everything else; what it leaves out does not apply. Keeping a row per sequence lets it
    threshold, average or resample over sequences as its definition demands. Of rows whose name starts with `"total_"`,
    all that is of use is the sum over sequences: that of each batch is one row, [1, ...].
    """

    definitions: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    layer: Callable[[LayerReading], Rows] = lambda _: {}
    router: Callable[[RouterStatistics], Rows] = lambda _: {}
    final: Callable[[FinalReading], Rows] = lambda _: {}
    combine: Callable[[Rows, dict[str, Rows], FinalReading], Rows] = all_rows
    finish: Callable[[dict[str, np.ndarray], ModelConfig | None], dict[str, Value | Estimate]] = lambda *_: {}


class Measurements(NamedTuple):
    """What was measured of one model."""

    values: dict[str, Value]
    estimates: dict[str, Estimate]  # of the scalars among them
    identity: Identity  # what was read: two of these are paired only where it is equal

    def intervals(self) -> dict[str, Interval | None]:
        """The confidence interval of every scalar; see `oasis_jax.evaluation.bootstrap`."""
        return bootstrap.intervals(self.estimates)
