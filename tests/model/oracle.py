"""A decoder in plain numpy and float64, written from the definitions alone: what the library's forward pass is compared
with.

Of the library it reads the fields of a config and nothing else. Every score, every frequency and every router's list of
sources is written out as its definition has it, one query at a time. Documents of a row lie one after the other.

Letters: B batch, T tokens of a row, D model width, N query heads, K key heads, H head size, L sources of a router.
"""

import math

import numpy as np

MAX_BETA, MAX_SCORE = 10.0, 50.0  # of depth routing (arXiv 2605.17887)
KEY_NORM_EPSILON = 1e-6  # of the static router's key norm
SOFTPICK_EPSILON = 1e-6  # relative to the largest exponential of a row


def forward(params, config, inputs, positions=None, segment_ids=None) -> dict:
    """The whole decoder.

    Args:
      params: nested dicts, layer by layer: {"embedding", "layers": {0: ...}, "routers": {0: ...}, "final_norm",
        "head"}.
      config: a ModelConfig.
      inputs: token ids [B, T], or vectors [B, T, I].
      positions: [B or 1, T], what rotary and learned positions see before `position_offset`; default 0 .. T-1.
      segment_ids: [B, T].

    Returns:
      logits [B, T, V]; null_mass and first_token_mass, one [B, N, T] a layer; layer_outputs, one [B, T, D] a layer;
      stream and final [B, T, D], before and after the final norm; router_weights {name: [B, T, L]} and
      router_null_mass {name: [B, T]}.
    """
    params, inputs = _in_float64(params), np.asarray(inputs)
    batch, length = inputs.shape[:2]
    positions = np.arange(length)[None] if positions is None else np.asarray(positions)
    positions = np.broadcast_to(positions + config.position_offset, (batch, length))
    segments = np.zeros((batch, length), int) if segment_ids is None else np.asarray(segment_ids)
    record = dict(null_mass=[], first_token_mass=[], layer_outputs=[], router_weights={}, router_null_mass={})

    def sublayer(index, h):
        """The output of sublayer 2l (attention) or 2l + 1 (MLP), and the null evidence of layer l."""
        layer, kind = params["layers"][index // 2], ("attention", "mlp")[index % 2]
        x = [norm(layer.get(f"{kind}_norm", {}), config, y) for y in (h if isinstance(h, list) else [h])]
        x = x[0] if len(x) == 1 else x
        if kind == "attention":
            output, null_mass, first = attention(layer[kind], config, index // 2, x, positions, segments)
            record["null_mass"].append(null_mass)
            record["first_token_mass"].append(first)
        else:
            output = mlp(layer[kind], config, x)
        return config.residual_multiplier * output, record["null_mass"][-1].mean(axis=1)

    def router(number, name, sources, evidence):
        mixture, weights, null_mass = route(params.get("routers", {}).get(number, {}), config, sources, evidence)
        record["router_weights"][name], record["router_null_mass"][name] = weights, null_mass
        return mixture

    embedding = embed(params["embedding"], config, inputs, positions)
    wiring = dict(residual=residual, cumulative=cumulative, delta=delta)[config.wiring]
    streams = wiring(config, embedding, sublayer, router)
    final = norm(params.get("final_norm", {}), config, streams[-1])
    tied = config.tied_head and config.inputs == "tokens"
    head = params["embedding"]["table"].T if tied else params["head"]["kernel"]
    record["layer_outputs"] = [h[0] if isinstance(h, list) else h for h in streams[2::2]]
    logits = config.logits_multiplier * (final @ head)
    logits = logits[..., : config.vocab_size] if config.inputs == "tokens" else logits  # without the table's padding
    return record | dict(logits=logits, stream=streams[-1], final=final)


def _in_float64(params):
    if hasattr(params, "items"):
        return {name: _in_float64(value) for name, value in params.items()}
    return np.asarray(params, np.float64)


def embed(params, config, inputs, positions) -> np.ndarray:
    """Rows of a table, or vectors times it; learned positions are added after the multiplier."""
    rows = params["table"][inputs] if config.inputs == "tokens" else inputs @ params["table"]
    rows = config.embedding_multiplier * rows
    return rows + params["positions"][positions] if config.learned_positions else rows


# Wirings: each returns the stream h before the first sublayer, after the first, after the second, ...


def clip(config, x) -> np.ndarray:
    """A new source within +-tau."""
    return np.clip(x, -config.residual_clip, config.residual_clip) if config.residual_clip else x


def sublayer_names(config) -> list[str]:
    """In order."""
    return [f"layer{layer}.{kind}" for layer in range(config.num_layers) for kind in ("attention", "mlp")]


def residual(config, embedding, sublayer, router) -> list:
    """The ordinary pre-norm transformer."""
    streams = [embedding]
    for index in range(2 * config.num_layers):
        streams.append(clip(config, streams[-1] + sublayer(index, streams[-1])[0]))
    return streams


def cumulative(config, embedding, sublayer, router) -> list:
    """Both candidates of a layer are routed together with the streams after all layers before it."""
    names, nothing = sublayer_names(config), np.zeros(embedding.shape[:2])
    history, evidence, streams = [embedding], [nothing], [embedding]
    for layer in range(config.num_layers):
        h = streams[-1]
        output, psi = sublayer(2 * layer, h)
        a = clip(config, h + output)
        h = router(2 * layer, names[2 * layer], [*history, a], [*evidence, psi])
        streams.append(h)
        m = clip(config, h + sublayer(2 * layer + 1, h)[0])
        h = router(2 * layer + 1, names[2 * layer + 1], [*history, a, m], [*evidence, psi, psi])
        streams.append(h)
        history, evidence = [*history, h], [*evidence, psi]
    return streams


def block_bounds(config) -> list[tuple[int, int]]:
    """First sublayer and end of each block: sizes differ by at most one, larger first; without blocks, one each."""
    count = 2 * config.num_layers
    blocks = config.blocks or count
    sizes = [count // blocks + (block < count % blocks) for block in range(blocks)]
    ends = np.cumsum(sizes)
    return list(zip(ends - sizes, ends))


def delta(config, embedding, sublayer, router) -> list:
    """Every sublayer reads a mixture of the embedding and of the sums of all blocks begun, the running one included."""
    names = [*sublayer_names(config), "final"]
    outputs, evidence, streams = [], [], [embedding]
    for index in range(2 * config.num_layers):
        output, psi = sublayer(index, streams[-1])
        output = rms(output, 1.0, config.norm_epsilon) if config.output_norm else output
        outputs, evidence = [*outputs, clip(config, output)], [*evidence, psi]
        begun = [slice(start, end) for start, end in block_bounds(config) if start <= index]
        sources = [embedding] + [np.sum(outputs[block], axis=0) for block in begun]
        psis = [np.zeros(embedding.shape[:2])] + [np.mean(evidence[block], axis=0) for block in begun]
        if config.router != "qkv":
            streams.append(router(index, names[index + 1], sources, psis))
        elif index % 2:  # before an attention three routers, but after the last layer one
            last = index + 1 == 2 * config.num_layers
            of = ["final"] if last else [f"{names[index + 1]}.{part}" for part in ("query", "key", "value")]
            read = [router(2 * index - 1 + i, name, sources, psis) for i, name in enumerate(of)]
            streams.append(read[0] if last else read)
        else:
            streams.append(router(2 * index, names[index + 1], sources, psis))
    return streams


def route(params, config, sources, evidence) -> tuple:
    """(mixture [B, T, D], weights [B, T, L], null mass [B, T]) of a router over L sources."""
    if config.depth_normalizer == "uniform":
        weights = np.full((*sources[0].shape[:2], len(sources)), 1 / len(sources))
        return np.mean(sources, axis=0), weights, np.zeros(sources[0].shape[:2])
    if config.router == "qkv":
        sources = [rms(source, 1.0, KEY_NORM_EPSILON) for source in sources]
    scores = []
    for index, source in enumerate(sources):
        if config.router == "qkv":
            scores.append(source @ params["query"])
        elif config.router == "static":
            key = source / np.sqrt(np.mean(source**2, -1, keepdims=True) + KEY_NORM_EPSILON) * params["key_norm"]
            scores.append(key @ params["query"])
        else:
            query, key = sources[-1] @ params["query"], source @ params["key"]
            recency = params["recency_bias"] * index / (len(sources) - 1)
            scores.append((query * key).sum(-1) / math.sqrt(key.shape[-1]) + recency)
    scores, psi = np.stack(scores, axis=-1), np.stack(evidence, axis=-1)
    if config.coupling:
        beta = config.fixed_beta or min(np.logaddexp(0.0, params["beta_raw"]), MAX_BETA)
        scores = scores - beta * (psi - psi.mean(-1, keepdims=True))
    if config.depth_normalizer == "sigmoid":
        weights = sigmoid(np.clip(scores, -MAX_SCORE, MAX_SCORE) - math.log(len(sources)))
        null_mass = np.maximum(0.0, 1.0 - weights.sum(-1))
        return np.einsum("btl,lbtd->btd", weights, np.stack(sources)), weights, null_mass
    exponentials = np.exp(np.clip(scores, -MAX_SCORE, MAX_SCORE))
    null = {"softmax": 0.0, "softmax1": 1.0}[config.depth_normalizer]
    total = null + exponentials.sum(-1)
    weights = exponentials / total[..., None]
    return np.einsum("btl,lbtd->btd", weights, np.stack(sources)), weights, null / total


# Sublayers


def rms(x, scale, epsilon) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def norm(params, config, x) -> np.ndarray:
    """The norm over the width that config.norm names."""
    kind, epsilon = config.norm, config.norm_epsilon
    if kind == "layernorm":
        centred = x - x.mean(-1, keepdims=True)
        return rms(centred, params["scale"], epsilon) + params["bias"]
    if kind == "preaffine":
        return rms(params["pre_scale"] * x, params["scale"], epsilon)
    if kind == "gatednorm":
        y = rms(x, params["scale"], epsilon)
        return y * sigmoid(silu(y @ params["gate_down"]) @ params["gate_up"])
    if kind == "dyt":
        return params["scale"] * np.tanh(params["alpha"] * x) + params["shift"]
    return {"rmsnorm": lambda: rms(x, params["scale"], epsilon), "none": lambda: x}[kind]()


def sigmoid(x) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x) -> np.ndarray:
    return x * sigmoid(x)


ACTIVATIONS = {
    "silu": silu,
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: x * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
}


def mlp(params, config, x) -> np.ndarray:
    """down(f(gate(x)) * up(x)), or down(f(up(x)))."""

    def linear(name, x):
        return x @ params[name] + (params[f"{name}_bias"] if config.mlp_bias else 0.0)

    activation = ACTIVATIONS[config.mlp_activation]
    hidden = activation(linear("gate", x)) * linear("up", x) if config.mlp_gated else activation(linear("up", x))
    return linear("down", hidden)


def attention(params, config, layer, x, positions, segments) -> tuple:
    """(output [B, T, D], null mass [B, N, T], first-token mass [B, N, T]) of one layer; x is normed. Of three x the
    second makes keys and the third values.
    """
    x, x_key, x_value = x if isinstance(x, list) else [x] * 3
    window, theta = config.window, config.rope_theta
    if config.layer_pattern:
        entry = config.layer_pattern[layer % len(config.layer_pattern)]
        window, theta = entry.window, entry.rope_theta
    inputs = {"query": x, "key": x_key, "value": x_value}
    query, key, value = (np.einsum("btd,dnh->btnh", y, params[name]) for name, y in inputs.items())
    if config.qkv_bias:
        query, key, value = query + params["query_bias"], key + params["key_bias"], value + params["value_bias"]
    if config.qk_norm:
        query = rms(query, params["query_norm"], config.norm_epsilon)
        key = rms(key, params["key_norm"], config.norm_epsilon)
    if theta:
        query, key = rotate(query, positions, config, theta), rotate(key, positions, config, theta)

    (batch, length, heads, size), group = query.shape, query.shape[2] // key.shape[2]
    out, means = np.zeros((2, *query.shape))
    null_mass, first_token_mass = np.zeros((batch, heads, length)), np.zeros((batch, heads, length))
    for b, n, t in np.ndindex(batch, heads, length):
        k = n // group  # the key head of query head n
        document = [j for j in range(length) if segments[b, j] == segments[b, t]]
        seen = [j for j in document if j <= t and (not window or t - j < window)]
        scores = scaled(key[b, seen, k] @ query[b, t, n], config, size)
        p, omega = probabilities(scores, null_logit(params, config, query[b, t, n], x[b, t], n, k), config, length)
        out[b, t, n] = p @ value[b, seen, k]
        means[b, t, n] = value[b, seen, k].mean(0)
        if config.normalizer == "null_key_value":
            out[b, t, n] += omega * null_shares(params, config, query[b, t, n], k) @ params["null_value"][:, k]
        null_mass[b, n, t] = omega
        first_token_mass[b, n, t] = p[seen.index(document[0])] if document[0] in seen else 0.0

    if config.gate == "elementwise":
        out = out * sigmoid(np.einsum("btd,dnh->btnh", x, params["gate"]))
    elif config.gate == "per_head":
        out = out * sigmoid(x @ params["gate"])[..., None]
    elif config.gate == "affine":  # arXiv 2602.23057, eq. 6 to 8 and 11
        alpha = np.clip(0.1 * (x @ params["gate"]) + 0.5, 0.0, 1.0)[..., None]
        out = alpha * out + (params["gate_average"][:, None] - alpha) * means
    out = np.einsum("btnh,nhd->btd", out, params["output"])
    return out + (params["output_bias"] if config.output_bias else 0.0), null_mass, first_token_mass


def scaled(products, config, size) -> np.ndarray:
    """Scores of products q.k."""
    scores = products * (config.attention_scale or 1.0 / math.sqrt(size))
    return config.logit_softcap * np.tanh(scores / config.logit_softcap) if config.logit_softcap else scores


def null_logit(params, config, query, x, n, k) -> float:
    """b of one query [H] of head n, whose layer reads x [D]; null keys are neither turned nor normed."""
    kind = config.normalizer
    if kind in ("null_key", "null_key_value"):
        return np.log(np.exp(scaled(params["null_key"][:, k] @ query, config, len(query))).sum())
    if kind == "token_null":
        return x @ params["null_projection"][:, n]
    if kind == "learned_sink":
        return params["null_logit"][n]
    return 0.0 if kind == "softmax1" else -math.inf


def null_shares(params, config, query, k) -> np.ndarray:
    """How much of the null of one query [H] belongs to each null key [P]."""
    e = np.exp(scaled(params["null_key"][:, k] @ query, config, len(query)))
    return e / e.sum()


def probabilities(scores, null_logit, config, num_keys) -> tuple:
    """(probabilities [S], null mass) of the S keys one query sees, out of num_keys in its row."""
    kind = config.normalizer
    if kind == "clipped":  # arXiv 2306.12929, eq. 4
        gamma = config.clip_gamma or -config.clip_alpha / num_keys
        p = np.exp(scores - scores.max())
        p = np.clip((config.clip_zeta - gamma) * p / p.sum() + gamma, 0.0, 1.0)
    elif kind == "softpick":  # arXiv 2504.20966
        top = max(scores.max(), 0.0)
        lifted = np.exp(scores - top) - np.exp(-top)
        p = np.maximum(lifted, 0.0) / (np.abs(lifted).sum() + SOFTPICK_EPSILON)
    elif kind in ("entmax15", "sparsemax"):
        p = entmax(scores, {"entmax15": 1.5, "sparsemax": 2.0}[kind])
    else:
        top = max(scores.max(), null_logit)
        p, null = np.exp(scores - top), np.exp(null_logit - top)
        return p / (p.sum() + null), null / (p.sum() + null)
    return p, max(0.0, 1.0 - p.sum())


def entmax(scores, alpha) -> np.ndarray:
    """[(alpha - 1) s - tau]_+ ** (1 / (alpha - 1)) with the tau that makes the sum 1 (arXiv 1905.05702), bisected."""
    z = (alpha - 1) * (scores - scores.max())

    def at(tau):
        return np.maximum(z - tau, 0.0) ** (1 / (alpha - 1))

    low, high = -1.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > 1 else (low, middle)
    return at(low)


# Rotary positions


def rotate(x, positions, config, theta) -> np.ndarray:
    """Channels i and i + half of the first `rope_fraction` of a head are the two parts of a complex number that turns
    with the position; the other channels stay.
    """
    size = int(config.rope_fraction * x.shape[-1])
    half = size // 2
    frequencies, factor = rotary(config.rope_scaling, theta, size, positions.max() + 1)
    turned = (x[..., :half] + 1j * x[..., half:size]) * np.exp(1j * positions[..., None, None] * frequencies) * factor
    return np.concatenate([turned.real, turned.imag, x[..., size:]], axis=-1)


def rotary(scaling, theta, size, longest) -> tuple:
    """(frequencies [size / 2] in radians a position, factor of cosine and sine); longest: the largest position + 1."""
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    if scaling is None:
        return np.array(plain), 1.0
    factor, original = scaling.factor, scaling.original_length
    attention_factor = 1.0
    if scaling.kind == "linear":
        frequencies = [f / factor for f in plain]
    elif scaling.kind == "llama3":
        frequencies = [_llama3(f, scaling) for f in plain]
    elif scaling.kind == "yarn":
        frequencies = [f * s + f / factor * (1 - s) for f, s in zip(plain, _yarn_share(scaling, theta, size))]
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    else:
        divisors = scaling.long_factors if longest > original else scaling.short_factors
        frequencies = [f / divisor for f, divisor in zip(plain, divisors, strict=True)]
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return np.array(frequencies), scaling.attention_factor or attention_factor


def _llama3(frequency, scaling) -> float:
    """Turns within the original length decide: many, as it is; few, divided; between, mixed."""
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return share * frequency + (1 - share) * frequency / scaling.factor


def _yarn_share(scaling, theta, size) -> list:
    """How much of each frequency stays (arXiv 2309.00071): a ramp over the channels, between the one that turns
    beta_fast times within the original length and the one that turns beta_slow times, rounded outwards.
    """

    def channel(turns):
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), size - 1)
    high = high + 0.001 if low == high else high  # the constant with which published models were run
    return [1 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(size // 2)]
