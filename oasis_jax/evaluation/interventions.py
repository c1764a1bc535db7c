"""What happens to the loss when something is taken away: mass is not causal importance, a source may be read
much and matter little.

Every intervention runs the trained model on the same batches with one thing changed and reports the change in loss,
with the interval of that change over sequences, beside the mean weight that was taken away.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.bootstrap import Estimate, intervals
from oasis_jax.evaluation.evaluator import Batch, Evaluator, FinalReading, Rows
from oasis_jax.evaluation.measures.perplexity import position_losses
from oasis_jax.evaluation.measures.residual_sinks import RESIDUAL_SINKS
from oasis_jax.evaluation.measures.sinks import SINKS
from oasis_jax.evaluation.numerics import Named
from oasis_jax.evaluation.passes import DecoderPass, collect
from oasis_jax.model.normalizers import NULL_LOGITS
from oasis_jax.model.wiring import schedule
from oasis_jax.placement import Placement
from pallas_kernels import DepthRoute

FAMILIES = ("embedding", "current", "older")
BANDS = ("early", "middle", "late")
_NULLS = [name for name, logit in NULL_LOGITS.items() if logit != -jnp.inf]  # softmax with a null

# Name -> what is changed; "sources" is many interventions.
INTERVENTIONS = {
    "sources": "the weights of a family of depth sources (embedding; current: what the router's own layer or the "
    "newest sublayer made; "
    "older: all others) set to 0 in the routers of one kind of sublayer and one third of the depth; renormalized: "
    "the rest, the depth "
    "null included, divided by what is left",
    "beta": "the inter-layer null signal's strength beta set to 0",
    "evidence": "the null evidence psi of every source set to 0; the centred evidence is then 0 too, so the loss "
    "has to be that of beta",
    "softmax": "token attention normalized by softmax instead, the null taken away",
    "depth_softmax": "depth weights normalized by softmax instead, the depth null taken away",
    "begin_token": "the first token of every sequence removed: no other sees it; the loss over the other targets, "
    "before "
    "and after",
    "sink_denominator": "the residual sink's channel, the one that residual_sinks finds where its ratio is largest, "
    "left out of the mean square of every norm of the stream: the mean is that of the other channels",
    "sink_output": "the same channel set to 0 in the output of every norm of the stream",
}
# What else is measured before and after, but for "sources", whose effects are many, and "begin_token", after which the
# first token is another.
SINK_MEASURES = ("sink_rate", "first_token_mass", "null_mass", "residual_sink_ratio")


class Effect(NamedTuple):
    """One intervention. `loss` and `change` in nats per token, or squared error; None: does not apply, `reason` says
    why. `sinks`: of each of SINK_MEASURES the value before and after.
    """

    intervention: str
    family: str | None = None
    sublayers: str | None = None  # "attention", "mlp", "final" or "all"
    band: str | None = None  # third of the depth, or "all"
    renormalized: bool | None = None
    mean_weight: float | None = None  # of the masked sources before the intervention, mean over routers and tokens
    loss: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    reason: str | None = None
    sinks: dict[str, tuple[float | None, float | None]] | None = None
    channel: int | None = None  # the residual sink's


class Changes(NamedTuple):
    """What the routers of a pass do otherwise: per router which sources count [L], whether the rest is
    renormalized, a factor on the evidence.
    """

    keep: dict[str, Float[Array, " L"]]
    renormalize: Float[Array, ""]
    evidence: Float[Array, ""]


class ChangedRouters(Named):
    """Numerics in which routers' weights and evidence are tampered with."""

    def __init__(self, changes: Changes):
        super().__init__()
        self.changes = changes

    def route(self, run, sources, evidence) -> DepthRoute:
        found = run(sources, [psi * self.changes.evidence for psi in evidence])
        weights = found.weights * self.changes.keep[self.scope.removesuffix(".router.")]
        left = weights.sum(-1) + found.null_mass
        scale = jnp.where(self.changes.renormalize > 0, 1 / jnp.maximum(left, jnp.finfo(left.dtype).tiny), 1.0)
        weights = weights * scale[..., None]
        wide = sum(weights[..., i, None] * source for i, source in enumerate(sources))
        return DepthRoute(wide.astype(found.output.dtype), weights, found.null_mass * scale)


class NormChanges(NamedTuple):
    """The channel that the norms of a pass miss: where in_denominator > 0 in their mean square, else in their
    output.
    """

    channel: Int[Array, ""]
    in_denominator: Float[Array, ""]
    epsilon: Float[Array, ""]


class ChangedNorms(Named):
    """Numerics in which one channel is missing from the norms of the stream."""

    def __init__(self, changes: NormChanges):
        super().__init__()
        self.changes = changes

    def norm(self, run, x):
        normed, (channel, in_denominator, epsilon) = run(x), self.changes
        missing = jnp.arange(x.shape[-1]) == channel
        square = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        others = jnp.where(missing, 0.0, square).sum(-1, keepdims=True) / (x.shape[-1] - 1)
        factor = jnp.sqrt((square.mean(-1, keepdims=True) + epsilon) / (others + epsilon))
        changed = jnp.where(in_denominator > 0, normed * factor, jnp.where(missing, 0.0, normed))
        return changed.astype(normed.dtype)


def _read_losses(reading: FinalReading) -> Rows:
    """The weighted losses of a sequence and their weights, and of them what the first target has, [B] each."""
    found, first = position_losses(reading), reading.tokens.context.order(reading.tokens.length) == 0
    weights = found["weight"]
    values = {"losses": found["nats" if "nats" in found else "squared_error"] * weights, "weights": weights}
    sums = {name: x.sum(1) for name, x in values.items()}
    return sums | {f"first_{name}": jnp.where(first, x, 0.0).sum(1) for name, x in values.items()}


_LOSSES = Evaluator(
    router=lambda router: {"depth": router.weights.mean(1)},
    combine=lambda layers, routers, reading: {f"depth/{name}": rows["depth"] for name, rows in routers.items()},
    final=_read_losses,
)


class _Model(NamedTuple):
    """A decoder, its batches, and what a pass of it tells: per sequence losses and weights [S], depth weights
    [S, L].
    """

    params: Mapping[str, Any]
    config: ModelConfig
    placement: Placement
    batches: Sequence[Batch]

    def run(self, changes: Changes | None = None) -> dict[str, np.ndarray]:
        return self._rows(changes, (_LOSSES,))[0]

    def measured(self, changes: Changes | NormChanges | None = None) -> "_Measured":
        """What `run` tells, and sinks."""
        losses, *rows = self._rows(changes, (_LOSSES, SINKS, RESIDUAL_SINKS))
        sinks = SINKS.finish(rows[0], self.config) | RESIDUAL_SINKS.finish(rows[1], self.config)
        return _Measured(losses, sinks)

    def _rows(self, changes: Changes | NormChanges | None, evaluators) -> list[dict[str, np.ndarray]]:
        numerics = {Changes: ChangedRouters, NormChanges: ChangedNorms}.get(type(changes))
        return collect(
            DecoderPass(self.config, self.placement, numerics), self.params, self.batches, evaluators, changes
        )[0]

    def unchanged(self) -> Changes:
        """Everything counts as it does."""
        sizes = {name: len(step.sources) for step in schedule(self.config).steps for name in step.routers}
        keep = {name: np.ones(size, np.float32) for name, size in sizes.items()}
        return Changes(keep, np.float32(0), np.float32(1))

    def with_config(self, **fields) -> "_Model":
        """The same parameters in a model of another kind; those that it does not know are not read."""
        return self._replace(config=dataclasses.replace(self.config, **fields))

    def without_beta(self) -> "_Model":
        """With a null signal of strength 0: softplus(-inf), in the program that is compiled already."""
        if self.config.fixed_beta:
            return self.with_config(coupling=False, fixed_beta=0.0)

        def off(path, x):
            return jnp.full_like(x, -jnp.inf) if path[-1].key == "beta_raw" else x

        return self._replace(
            params={**self.params, "routers": jax.tree_util.tree_map_with_path(off, self.params["routers"])}
        )

    def without_begin_token(self) -> "_Model":
        """With a first token that no other sees and that predicts nothing; the others start at position 0."""
        return self._replace(batches=[_without_first_token(batch) for batch in self.batches])


class _Measured(NamedTuple):
    """What a pass tells per sequence about losses, and what sinks it has."""

    losses: dict[str, np.ndarray]
    sinks: Mapping[str, Any]

    def channel(self) -> int:
        """That of the residual sink: of the layer where it stands out most."""
        layer = int(np.argmax(self.sinks["residual_sink_ratio_by_layer"]))
        return self.sinks["residual_sink_channel_by_layer"][layer]


def _compared(effect: Effect, base: _Measured, changed: _Measured) -> Effect:
    """`_effect` with sinks before and after; None where a measure does not apply."""
    value = lambda sinks, name: sinks[name].value if name in sinks else None
    sinks = {name: tuple(value(x.sinks, name) for x in (base, changed)) for name in SINK_MEASURES}
    return _effect(effect._replace(sinks=sinks), base.losses, changed.losses)


def _without_first_token(batch: Batch) -> Batch:
    shape = batch["inputs"].shape[:2]
    first = np.broadcast_to(np.arange(shape[1]) == 0, shape)
    positions = batch.get("positions", np.broadcast_to(np.arange(shape[1]), shape))
    ids = batch.get("segment_ids", np.zeros(shape, np.int32))
    return batch | {
        "segment_ids": np.where(first, ids.min() - 1, ids).astype(np.int32),
        "positions": np.maximum(positions - 1, 0).astype(np.int32),
        "weights": np.where(first, 0, batch["weights"]).astype(batch["weights"].dtype),
    }


def _effect(effect: Effect, base: Mapping[str, np.ndarray], changed: Mapping[str, np.ndarray]) -> Effect:
    """Fills in loss, change and interval; the first targets are left out of both where the begin token is."""
    first = effect.intervention == "begin_token"
    losses, counts = (base[name] - first * base[f"first_{name}"] for name in ("losses", "weights"))
    difference = Estimate((changed["losses"] - losses)[:, None], counts[:, None])
    interval = intervals({"change": difference})["change"]
    loss = float(changed["losses"].sum() / counts.sum())
    return effect._replace(loss=loss, change=difference.value, interval=interval)


def families(config: ModelConfig) -> dict[str, dict[str, list[int]]]:
    """For every router which of its sources belong to which family."""
    found = {}
    for step in schedule(config).steps:
        if step.routers:
            newest = len(step.sources) - step.current
            members = {"embedding": [0], "older": [*range(1, newest)], "current": [*range(newest, len(step.sources))]}
            found |= dict.fromkeys(step.routers, members)
    return found


def _groups(config: ModelConfig) -> dict[tuple[str, str], list[str]]:
    """(sublayers, band) -> its routers; ("all", "all") first. A router counts to the sublayer that it is
    named after.
    """
    steps = {step.name: step for step in schedule(config).steps}
    found = {("all", "all"): schedule(config).routers}
    for name in schedule(config).routers:
        step = steps.get(name) or steps.get(name.rpartition(".")[0])
        band = BANDS[step.layer * len(BANDS) // config.num_layers] if step else BANDS[-1]
        found.setdefault((step.kind if step else name, band), []).append(name)
    return found


def _mask_sources(model: _Model, base: Mapping[str, np.ndarray]) -> list[Effect]:
    members, unchanged, found = families(model.config), model.unchanged(), []
    for (sublayers, band), routers in _groups(model.config).items():
        for family in FAMILIES:
            masked = {name: members[name][family] for name in routers if members[name][family]}
            if not masked:
                continue
            keep = dict(unchanged.keep)
            for name, sources in masked.items():
                keep[name] = np.where(np.isin(np.arange(len(keep[name])), sources), 0, 1).astype(np.float32)
            weights = [base[f"depth/{name}"][:, sources].sum(1).mean() for name, sources in masked.items()]
            # Weights that do not share a sum have nothing to make up for.
            for renormalized in (False,) if model.config.depth_normalizer == "sigmoid" else (False, True):
                changed = model.run(unchanged._replace(keep=keep, renormalize=np.float32(renormalized)))
                effect = Effect("sources", family, sublayers, band, renormalized, float(np.mean(weights)))
                found.append(_effect(effect, base, changed))
    return found


def _why_not(name: str, config: ModelConfig, begin_token: bool) -> str | None:
    """Why an intervention does not apply to a model, if so."""
    applies = {
        "sources": (config.wiring != "residual", "models with depth routers"),
        "beta": (config.coupling, "models with the inter-layer null signal"),
        "evidence": (config.coupling, "models with the inter-layer null signal"),
        "softmax": (config.normalizer in _NULLS, f"normalizers {', '.join(_NULLS)}"),
        "depth_softmax": (
            config.wiring != "residual" and config.depth_normalizer == "softmax1",
            "depth routers with Softmax1",
        ),
        "begin_token": (begin_token, "data whose sequences start with a begin token"),
        "sink_denominator": (config.norm == "rmsnorm", "norm=rmsnorm"),
        "sink_output": (config.norm != "none", "models with norms"),
    }
    fits, only_for = applies[name]
    return None if fits else f"not applicable: only for {only_for}"


def choose(names: Iterable[str], where: str = "interventions") -> list[str]:
    """The interventions that a list of names asks for; "all" is every one. Raises UserError for an unknown name."""
    names = list(names)
    for name in names:
        if name != "all" and name not in INTERVENTIONS:
            raise unknown_name(where, name, ("all", *INTERVENTIONS))
    return [name for name in INTERVENTIONS if name in names or "all" in names]


def intervene(
    params: Mapping[str, Any],
    config: ModelConfig,
    placement: Placement,
    batches: Iterable[Batch],
    *,
    interventions: Iterable[str] = ("all",),
    begin_token: bool = False,
) -> list[Effect]:
    """Runs a decoder with one thing changed at a time.

    Args:
      params, config, placement, batches: see `oasis_jax.evaluation.evaluate`; batches have targets and weights.
      interventions: names of `INTERVENTIONS`, or "all".
      begin_token: whether every sequence starts with a begin token.

    Returns:
      One Effect per intervention, "sources" many; what does not apply to the model has a `reason` and no loss.

    Raises:
      UserError: an unknown intervention, or no batch.
    """
    chosen, model = choose(interventions), _Model(params, config, placement, list(batches))
    if not model.batches:
        raise UserError("interventions: batches is empty; give at least one")
    base, found = model.measured(), []

    def without_channel(in_denominator: float) -> _Measured:
        epsilon = np.float32(config.norm_epsilon)
        return model.measured(NormChanges(np.int32(base.channel()), np.float32(in_denominator), epsilon))

    changes = {
        "beta": lambda: model.without_beta().measured(),
        "evidence": lambda: model.measured(model.unchanged()._replace(evidence=np.float32(0))),
        "softmax": lambda: model.with_config(normalizer="softmax").measured(),
        "depth_softmax": lambda: model.with_config(depth_normalizer="softmax").measured(),
        "sink_denominator": lambda: without_channel(1),
        "sink_output": lambda: without_channel(0),
    }
    for name in chosen:
        reason = _why_not(name, config, begin_token)
        if reason:
            found.append(Effect(name, reason=reason))
        elif name == "sources":
            found += _mask_sources(model, base.losses)
        elif name == "begin_token":
            found.append(_effect(Effect(name), base.losses, model.without_begin_token().run()))
        else:
            channel = base.channel() if name.startswith("sink_") else None
            found.append(_compared(Effect(name, channel=channel), base, changes[name]()))
    return found
