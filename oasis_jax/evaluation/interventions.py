"""What happens to the loss when something is taken away: mass is not causal importance, a source may be read
much and matter little.

Every intervention runs the trained model on the same batches with one thing changed and reports the change in loss,
with the interval of that change over sequences, beside the mean weight that was taken away.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError, unknown_name
from oasis_jax.evaluation.bootstrap import Estimate, intervals
from oasis_jax.evaluation.evaluator import Batch
from oasis_jax.model.statistics import RouterStatistics
from oasis_jax.model.wiring import router_names
from oasis_jax.training.loss import token_losses

FAMILIES = ("embedding", "current", "older")
BANDS = ("early", "middle", "late")

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
    "begin_token": "the first token of every sequence removed; the loss over the other targets, before and after",
}


class Effect(NamedTuple):
    """One intervention. `loss` and `change` in nats per token, or squared error; None: does not apply, `reason` says
    why.
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


class _Changes(NamedTuple):
    """What a pass does otherwise: per router which sources are kept [L], whether the rest is renormalized, a
    factor on the evidence.
    """

    keep: dict[str, Float[Array, " L"]]
    renormalize: Float[Array, ""]
    evidence: Float[Array, ""]


class _ChangedRouter(nnx.Module):
    """A router whose weights and evidence are tampered with."""

    def __init__(self, router: nnx.Module, keep: Array, changes: _Changes):
        self.router, self.keep = router, nnx.data(keep)
        self.renormalize, self.evidence = nnx.data(changes.renormalize), nnx.data(changes.evidence)

    def __call__(
        self, sources: Sequence[Array], evidence: Sequence[Array], **options
    ) -> tuple[Array, RouterStatistics]:
        output, statistics = self.router(sources, [psi * self.evidence for psi in evidence], **options)
        kept = statistics.weights * self.keep
        left = kept.sum(-1) + statistics.null_mass
        scale = jnp.where(self.renormalize > 0, 1 / jnp.maximum(left, jnp.finfo(left.dtype).tiny), 1.0)
        weights = kept * scale[..., None]
        wide = sum(weights[..., i, None] * source for i, source in enumerate(sources))
        return wide.astype(output.dtype), RouterStatistics(weights, statistics.null_mass * scale, statistics.beta)


@functools.partial(jax.jit, static_argnames="graphdef")
def _pass(graphdef, state, batch, changes: _Changes) -> tuple[Array, Array, dict[str, Array]]:
    """Per sequence: the weighted loss of every target [B, T], its weight [B, T] and each router's mean
    weights [B, L].
    """
    model = nnx.merge(graphdef, state)
    for index, name in enumerate(router_names(model.config)):
        model.routers[index] = _ChangedRouter(model.routers[index], changes.keep[name], changes)
    outputs, statistics = model(batch["inputs"], segment_ids=batch.get("segment_ids"))
    losses = token_losses(outputs, batch, model.config) * batch["weights"]
    return losses, batch["weights"], {name: router.weights.mean(1) for name, router in statistics.routers.items()}


class _Measured(NamedTuple):
    """All sequences of one pass in float64: losses and target weights [S, T], mean depth weights [S, L]."""

    losses: np.ndarray
    weights: np.ndarray
    depth: dict[str, np.ndarray]


def _run(model: nnx.Module, batches: Sequence[Batch], changes: _Changes) -> _Measured:
    graphdef, state = nnx.split(model)
    found = [jax.device_get(_pass(graphdef, state, dict(batch), changes)) for batch in batches]
    return _Measured(*jax.tree.map(lambda *x: np.concatenate([np.asarray(part, np.float64) for part in x]), *found))


def _effect(effect: Effect, base: _Measured, changed: _Measured, first: int = 0) -> Effect:
    """Fills in loss, change and interval; targets before `first` are left out of `base`, which `changed` does
    not have.
    """
    losses, counts = base.losses[:, first:].sum(1), base.weights[:, first:].sum(1)
    difference = Estimate((changed.losses.sum(1) - losses)[:, None], counts[:, None])
    interval = intervals({"change": difference})["change"]
    return effect._replace(loss=float(changed.losses.sum() / counts.sum()), change=difference.value, interval=interval)


def families(config: ModelConfig, counts: dict[str, int]) -> dict[str, dict[str, list[int]]]:
    """For every router which of its sources, given their number, belong to which family."""
    found = {}
    for index, name in enumerate(router_names(config)):
        count = counts[name]
        newest = index % 2 + 1 if config.wiring == "cumulative" else 1
        found[name] = {
            "embedding": [0],
            "older": list(range(1, count - newest)),
            "current": list(range(count - newest, count)),
        }
    return found


def _place(name: str, config: ModelConfig) -> tuple[str, str]:
    """'layer3.mlp' -> ('mlp', 'late') in a model of four layers."""
    if name == "final":
        return "final", BANDS[-1]
    layer, kind = name.removeprefix("layer").split(".")
    return kind, BANDS[int(layer) * len(BANDS) // config.num_layers]


def _groups(config: ModelConfig) -> dict[tuple[str, str], list[str]]:
    """(sublayers, band) -> its routers; ("all", "all") first."""
    found = {("all", "all"): router_names(config)}
    for name in router_names(config):
        found.setdefault(_place(name, config), []).append(name)
    return found


def _unchanged(model: nnx.Module, batch: Batch) -> _Changes:
    """Everything kept, for routers of the sizes this model has."""
    shapes = nnx.eval_shape(lambda: model(jnp.asarray(batch["inputs"][:1]))[1].routers)
    keep = {name: np.ones(router.weights.shape[-1], np.float32) for name, router in shapes.items()}
    return _Changes(keep, np.float32(0), np.float32(1))


def _mask_sources(model: nnx.Module, batches: Sequence[Batch], base: _Measured, unchanged: _Changes) -> list[Effect]:
    members = families(model.config, {name: len(keep) for name, keep in unchanged.keep.items()})
    found = []
    for (sublayers, band), routers in _groups(model.config).items():
        for family in FAMILIES:
            masked = {name: members[name][family] for name in routers if members[name][family]}
            if not masked:
                continue
            keep = dict(unchanged.keep)
            for name, sources in masked.items():
                keep[name] = np.where(np.isin(np.arange(len(keep[name])), sources), 0, 1).astype(np.float32)
            mean_weight = float(
                np.mean([base.depth[name][:, sources].sum(1).mean() for name, sources in masked.items()])
            )
            for renormalized in (False, True):
                changed = _run(model, batches, unchanged._replace(keep=keep, renormalize=np.float32(renormalized)))
                found.append(
                    _effect(Effect("sources", family, sublayers, band, renormalized, mean_weight), base, changed)
                )
    return found


def _copy(model: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: x, state)
    )  # variables of its own; split and merge alone share them


def without_beta(model: nnx.Module) -> nnx.Module:
    """A copy whose inter-layer null signal has strength 0: softplus(-inf)."""
    model = _copy(model)
    for router in model.routers:
        router.beta_raw[...] = jnp.full_like(router.beta_raw[...], -jnp.inf)
    return model


def with_softmax(model: nnx.Module) -> nnx.Module:
    """A copy whose token attention is normalized by softmax; a learned null logit is not read."""
    model = _copy(model)
    for layer in model.layers:
        layer.attention.config = dataclasses.replace(layer.attention.config, normalizer="softmax")
    return model


def with_depth_softmax(model: nnx.Module) -> nnx.Module:
    """A copy whose depth routers are normalized by softmax."""
    model = _copy(model)
    for router in model.routers:
        router.config = dataclasses.replace(router.config, depth_normalizer="softmax")
    return model


def without_first_token(batch: Batch) -> Batch:
    """A batch [B, T - 1, ...] that starts one token later."""
    return {name: values[:, 1:] for name, values in batch.items()}


def _why_not(name: str, config: ModelConfig, begin_token: bool) -> str | None:
    """Why an intervention does not apply to a model, if so."""
    applies = {
        "sources": (config.wiring != "residual", "models with depth routers"),
        "beta": (config.coupling, "models with the inter-layer null signal"),
        "evidence": (config.coupling, "models with the inter-layer null signal"),
        "softmax": (config.normalizer in ("softmax1", "learned_sink"), "normalizers softmax1 and learned_sink"),
        "depth_softmax": (
            config.wiring != "residual" and config.depth_normalizer == "softmax1",
            "depth routers with Softmax1",
        ),
        "begin_token": (begin_token, "data whose sequences start with a begin token"),
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
    model: nnx.Module, batches: Sequence[Batch], *, interventions: Iterable[str] = ("all",), begin_token: bool = False
) -> list[Effect]:
    """Runs a Decoder with one thing changed at a time.

    Args:
      model: an `oasis_jax.model.decoder.Decoder`; it is left as it is.
      batches: dicts of arrays [B, T, ...] with "inputs", "targets" and "weights"; at least one.
      interventions: names of `INTERVENTIONS`, or "all".
      begin_token: whether every sequence starts with a begin token.

    Returns:
      One Effect per intervention, "sources" many; what does not apply to the model has a `reason` and no loss.

    Raises:
      UserError: an unknown intervention, or no batch.
    """
    chosen, batches = choose(interventions), list(batches)
    if not batches:
        raise UserError("interventions: batches is empty; give at least one")
    unchanged = _unchanged(model, batches[0])
    base = _run(model, batches, unchanged)
    changed_models: dict[str, Callable] = {
        "beta": without_beta,
        "softmax": with_softmax,
        "depth_softmax": with_depth_softmax,
    }
    found = []
    for name in chosen:
        reason = _why_not(name, model.config, begin_token)
        if reason:
            found.append(Effect(name, reason=reason))
        elif name == "sources":
            found += _mask_sources(model, batches, base, unchanged)
        elif name == "evidence":
            found.append(_effect(Effect(name), base, _run(model, batches, unchanged._replace(evidence=np.float32(0)))))
        elif name == "begin_token":
            shorter = [without_first_token(batch) for batch in batches]
            found.append(_effect(Effect(name), base, _run(model, shorter, unchanged), first=1))
        else:
            found.append(_effect(Effect(name), base, _run(changed_models[name](model), batches, unchanged)))
    return found
