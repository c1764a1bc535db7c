"""Methods by name: what each fixes of a model, everything else being orthogonal to it."""

# oasis and its baselines attnres_cumulative, softmax1, clipped, entmax15 and sparsemax: arXiv 2605.17887; attnres:
# 2603.15031; attnres_qkv: Inkling-2; gated: 2306.12929; learned_sink: 2601.22966; null_key: 2410.10781; token_null:
# Inkling-2; null_key_value: 2410.05265's prefix as a parameter. oasis_blocks is ours: OASIS on the blocks of AttnRes.
# attnres_rms: rms-block-attnres, but for the running block, whose outputs are normalized here too.
_CUMULATIVE = dict(
    wiring="cumulative",
    router="projected",
    depth_normalizer="softmax",
    coupling=False,
    gate="none",
    blocks=0,
    output_norm=False,
)
PRESETS: dict[str, dict[str, str | bool | int]] = {
    "residual": _CUMULATIVE | dict(normalizer="softmax", wiring="residual", router="none"),
    "attnres": _CUMULATIVE | dict(normalizer="softmax", wiring="delta", router="static"),
    "attnres_rms": _CUMULATIVE
    | dict(normalizer="softmax", wiring="delta", router="static", blocks=8, output_norm=True),
    "attnres_qkv": _CUMULATIVE | dict(normalizer="softmax", wiring="delta", router="qkv", blocks=8),
    "attnres_cumulative": _CUMULATIVE | dict(normalizer="softmax"),
    "softmax1": _CUMULATIVE | dict(normalizer="softmax1"),
    "clipped": _CUMULATIVE | dict(normalizer="clipped"),
    "entmax15": _CUMULATIVE | dict(normalizer="entmax15"),
    "sparsemax": _CUMULATIVE | dict(normalizer="sparsemax"),
    "gated": _CUMULATIVE | dict(normalizer="softmax", gate="elementwise"),
    "learned_sink": _CUMULATIVE | dict(normalizer="learned_sink"),
    "null_key": _CUMULATIVE | dict(normalizer="null_key"),
    "null_key_value": _CUMULATIVE | dict(normalizer="null_key_value"),
    "token_null": _CUMULATIVE | dict(normalizer="token_null"),
    "oasis": _CUMULATIVE | dict(normalizer="softmax1", depth_normalizer="softmax1", coupling=True),
    "oasis_blocks": _CUMULATIVE
    | dict(
        normalizer="softmax1", wiring="delta", router="static", depth_normalizer="softmax1", coupling=True, blocks=8
    ),
}
METHOD_FIELDS = ("normalizer", "wiring", "router", "depth_normalizer", "coupling", "gate", "blocks", "output_norm")
