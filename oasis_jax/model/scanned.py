"""The stack of layers as loops, for training: memory linear in depth and a program whose size does not grow with it.

The same functions and parameters as `oasis_jax.model.decoder.Decoder`, without its Statistics. Parameters are stacked, as a
training state holds them: see `oasis_jax.model.layout`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oasis_jax.config import ModelConfig
from oasis_jax.model.attention import Constrain, attention
from oasis_jax.model.decoder import Inputs, embed
from oasis_jax.model.loop import Loop, history_stack
from oasis_jax.model.mlp import mlp
from oasis_jax.model.norms import norm
from oasis_jax.model.parameters import Parameters
from oasis_jax.model.remat import rematerialized
from oasis_jax.model.router import DEPTH_NULL_LOGITS, coupling_strength
from oasis_jax.model.wiring import clip
from pallas_kernels import route_finished, route_running, routed_stack

Stream = Float[Array, "B T D"]
Psi = Float[Array, "B T"]


def uses_scan(config: ModelConfig, platform: str) -> bool:
    """Whether training runs the layers as loops on a platform ("cpu", "gpu", "tpu")."""
    # Masked reads of a whole buffer cost a CPU more than they save at the depths one trains there.
    return config.stack == "scan" or (config.stack == "auto" and platform != "cpu")


def follows_remat(config: ModelConfig) -> bool:
    """Whether `model.remat` changes what a loop over these layers keeps; the others recompute every layer
    whatever it says.
    """
    return config.wiring == "residual" or (config.blocks > 0 and config.router == "static")


def final_stream(
    params: dict, config: ModelConfig, inputs: Inputs, *, segment_ids: Int[Array, "B T"] | None, constrain: Constrain
) -> Stream:
    """What the final norm reads; equals that of `Decoder`.

    Args:
      params: stacked; see `oasis_jax.model.layout`.
      config: any wiring and router.
      inputs, segment_ids, constrain: see `Decoder.__call__`.
    """
    embedding = constrain(embed(params["ends"], config, inputs), ("batch", "stream", None))
    if config.wiring == "residual":
        run = _residual
    elif config.wiring == "cumulative" or config.router == "projected" or (config.blocks and config.remat != "none"):
        run = _history
    else:
        run = _blocks if config.blocks else _full
    return run(params, config, embedding, segment_ids, constrain)


def attend(
    config: ModelConfig, constrain: Constrain, layer: Parameters, segment_ids, h: Stream, psi: Psi
) -> tuple[Stream, Psi]:
    """The attention sublayer and the null evidence it makes."""
    del psi
    normed = norm(layer.get("attention_norm", {}), config, h)
    output, statistics = attention(layer["attention"], config, normed, segment_ids=segment_ids, constrain=constrain)
    psi = constrain(statistics.null_mass.mean(axis=1), ("batch", "stream"))
    return clip_delta(config, constrain(output, ("batch", "stream", None))), psi


def feed(
    config: ModelConfig, constrain: Constrain, layer: Parameters, segment_ids, h: Stream, psi: Psi
) -> tuple[Stream, Psi]:
    """The MLP sublayer; it carries its layer's evidence."""
    del segment_ids
    output = mlp(layer["mlp"], norm(layer.get("mlp_norm", {}), config, h), constrain=constrain)
    return clip_delta(config, constrain(output, ("batch", "stream", None))), psi


def clip_delta(config: ModelConfig, output: Stream) -> Stream:
    """Residual clipping bounds a source: in the delta wiring the output, in the others its sum with the stream."""
    return clip(config, output) if config.wiring == "delta" else output


SUBLAYERS = (attend, feed)


def _parts(layers: dict) -> tuple[dict, dict]:
    """The parameters of the attention and of the MLP sublayer."""
    names = (("attention_norm", "attention"), ("mlp_norm", "mlp"))
    return tuple({name: layers[name] for name in part if name in layers} for part in names)


def _residual(params, config, embedding, segment_ids, constrain):
    def layer(stream, own):
        psi = jnp.zeros(stream.shape[:2], jnp.float32)
        for sublayer, part in zip(SUBLAYERS, _parts(own)):
            stream = clip(config, stream + sublayer(config, constrain, part, segment_ids, stream, psi)[0])
        return stream, None

    return jax.lax.scan(rematerialized(layer, config.remat), embedding, params["layers"])[0]


def _queries(params, config, wide) -> tuple[Array, Array | None]:
    """Of every router: the query with the key norm's gain, and beta; None without coupling."""
    routers = params["routers"]
    beta = coupling_strength(routers["beta_raw"]) if config.coupling else None
    return routers["query"].astype(wide) * routers["key_norm"].astype(wide), beta


def _full(params, config, embedding, segment_ids, constrain):
    queries, betas = _queries(params, config, jnp.promote_types(embedding.dtype, jnp.float32))
    sublayers = [partial(sublayer, config, constrain) for sublayer in SUBLAYERS]
    parts = _parts(params["layers"])
    null_logit = DEPTH_NULL_LOGITS[config.depth_normalizer]
    return routed_stack(sublayers, parts, segment_ids, embedding, queries, betas, null_logit=null_logit)


def _history(params, config, embedding, segment_ids, constrain):
    loop = Loop(tuple(partial(sublayer, config, constrain) for sublayer in SUBLAYERS), config, constrain)
    return history_stack(loop, _parts(params["layers"]), params["routers"], segment_ids, embedding)


def _blocks(params, config, embedding, segment_ids, constrain):
    """Blocks one after the other; inside a block the whole layers are a loop, halves of layers at its ends
    stand alone.

    Phase 1 gives as many streams as a block has sublayers, and they are kept: without remat, where everything is. With
    it, `_history` needs less.
    """
    wide = jnp.promote_types(embedding.dtype, jnp.float32)
    layers, routers = params["layers"], params["routers"]
    count = 2 * config.num_layers
    starts = [block * (count // config.blocks) for block in range(config.blocks)]
    sources, evidence = [embedding], [jnp.zeros(embedding.shape[:2], wide)]
    h, psi = embedding, evidence[0]
    for start, end in zip(starts, [*starts[1:], count]):
        own = jax.tree.map(lambda x, s=slice(start, end): x[s], routers)  # router s reads what sublayers up to s made
        betas = coupling_strength(own["beta_raw"]) if config.coupling else None
        options = dict(null_evidence=jnp.stack(evidence), couplings=betas) if config.coupling else {}
        finished = route_finished(sources, own["query"], key_norm_scales=own["key_norm"], **options)
        step = partial(_block_step, config, constrain, segment_ids, tuple(sources), tuple(evidence))
        carry = (jnp.zeros_like(embedding), jnp.zeros_like(evidence[0]), jnp.zeros((), wide), h, psi)
        carry = _run_block(step, layers, (own, betas, finished), start, end, carry)
        running, mean, _, h, psi = carry
        sources, evidence = [*sources, running], [*evidence, mean]
    return h


def _block_step(config, constrain, segment_ids, sources, evidence, kind: int, carry, part, routing):
    """One sublayer of a block and the router after it."""
    running, mean, members, h, psi = carry
    router, beta, finished = routing
    output, psi = SUBLAYERS[kind](config, constrain, part, segment_ids, h, psi)
    psi = psi.astype(mean.dtype)
    running, mean = running + output, (mean * members + psi) / (members + 1)
    options = dict(null_evidence=jnp.stack([*evidence, mean]), coupling=beta) if config.coupling else {}
    h = route_running(
        finished,
        running,
        router["query"],
        sources=sources,
        key_norm_scale=router["key_norm"],
        null_logit=DEPTH_NULL_LOGITS[config.depth_normalizer],
        **options,
    ).output
    return running, mean, members + 1, h, psi


def _run_block(step: Callable, layers, routing, start: int, end: int, carry):
    def single(carry, s):
        part = jax.tree.map(lambda x: x[s // 2], _parts(layers)[s % 2])
        own = jax.tree.map(lambda x: x[s - start], routing)
        return step(s % 2, carry, part, own)

    def layer(carry, xs):
        parts, pairs = xs
        for kind in range(2):
            carry = step(kind, carry, parts[kind], jax.tree.map(lambda x, kind=kind: x[kind], pairs))
        return carry, None

    if start % 2:
        carry = single(carry, start)
    first, last = start + start % 2, end - end % 2
    if last > first:
        parts = jax.tree.map(lambda x: x[first // 2 : last // 2], _parts(layers))
        pairs = jax.tree.map(lambda x: x[first - start : last - start].reshape(-1, 2, *x.shape[1:]), routing)
        carry = jax.lax.scan(layer, carry, (parts, pairs))[0]
    if end % 2 and end - 1 >= first:
        carry = single(carry, end - 1)
    return carry
