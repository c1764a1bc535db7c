"""Typical uses of the public API, for a type checker alone: `tests/check_types.py` reads it, nothing runs it.

What a user would get wrong is marked as an error that has to be there: one that is not found is an error itself.
"""

from typing import Any, assert_type

import jax
import numpy as np
from flax import nnx

from oasis_jax import (
    MLP,
    Attention,
    AttentionConfig,
    AttentionStatistics,
    Context,
    Decoder,
    MLPConfig,
    ModelConfig,
    Norm,
    NormConfig,
    Pretrained,
    Router,
    RouterConfig,
    RouterStatistics,
    Sampling,
    Statistics,
    attention_fn,
    dot_product_attention,
    generate,
    linen,
    load_pretrained,
)
from oasis_jax.config import Config, MeshConfig, RunConfig
from oasis_jax.decoding import Generated
from oasis_jax.evaluation import Measurements, evaluate_model, measure
from oasis_jax.evaluation.quantization import Scheme, parse_scheme, quantized
from oasis_jax.pretrained import rotate, save_pretrained, transplant_sink
from oasis_jax.study import Claim, Outcome, Study
from oasis_jax.training.loop import fit
from pallas_kernels import DepthRoute, NullAttention, depth_route, explain, null_attention


def modules(x: jax.Array) -> None:
    rngs = nnx.Rngs(0)
    y, statistics = Attention(AttentionConfig(width=64, num_heads=4, normalizer="softmax1"), rngs=rngs)(x)
    assert_type(y, jax.Array)
    assert_type(statistics, AttentionStatistics)
    assert_type(statistics.null_mass, jax.Array)
    mixed, routing = Router(RouterConfig(width=64, coupling=True), rngs=rngs)([x, y], [statistics.null_mass])
    assert_type(mixed, jax.Array)
    assert_type(routing, RouterStatistics)
    assert_type(MLP(MLPConfig(width=64), rngs=rngs)(Norm(NormConfig(), 64, rngs=rngs)(x)), jax.Array)
    decoder = Decoder(ModelConfig(preset="oasis", num_layers=4, vocab_size=64), rngs=rngs)
    logits, seen = decoder(x, Context(segment_ids=x))
    assert_type(logits, jax.Array)
    assert_type(seen, Statistics)
    assert_type(linen.params_from_nnx(decoder.parameters()), dict[str, Any])


def operators(x: jax.Array) -> None:
    result = null_attention(x, x, x, null_logit=0.0, window=5)
    assert_type(result, NullAttention)
    assert_type(result.output, jax.Array)
    assert_type(depth_route([x, x], x), DepthRoute)
    assert_type(dot_product_attention(x, x, x, is_causal=True, null_logit=x), jax.Array | tuple[jax.Array, jax.Array])
    nnx.MultiHeadAttention(8, 64, decode=False, attention_fn=attention_fn(null_logit=0.0), rngs=nnx.Rngs(0))
    print(explain("null_attention", x, x, x))


def models(workdir: str) -> None:
    model = load_pretrained(workdir, dtype="float32", mesh=MeshConfig(fsdp=4))
    assert_type(model, Pretrained)
    assert_type(generate(model, ["a", "b"], max_new_tokens=3, sampling=Sampling(temperature=0.5)), list[Generated])
    better = rotate(transplant_sink(model, [0]))
    assert_type(save_pretrained(better, workdir), str)
    assert_type(quantized(model, "w8a8"), Pretrained)
    assert_type(parse_scheme("w8a8+mse"), Scheme)
    evaluate_model(model.decoder(), [{"inputs": np.zeros((1, 3)), "targets": np.zeros((1, 3))}])


def measured(params: dict[str, jax.Array], x: np.ndarray) -> None:
    found = measure(lambda params, tokens: params["a"], params, [{"inputs": x, "targets": x}], measures=["perplexity"])
    assert_type(found, Measurements)


def runs(workdir: str) -> Study:
    assert_type(fit(Config(run=RunConfig(steps=3)), workdir), dict[str, float])
    return Study(
        title="a question",
        base=Config(),
        methods={"softmax": ("model.preset=residual",), "null": ("model.preset=softmax1",)},
        seeds=(0, 1, 2),
        outcomes=(Outcome("perplexity", "perplexity"),),
        claims=(Claim("costs nothing", "ours", "perplexity", "null", "softmax"),),
    )


def mistakes(x: jax.Array) -> None:
    AttentionConfig(normalizer="sofmax1")  # pyright: ignore[reportArgumentType]
    AttentionConfig(widht=64)  # pyright: ignore[reportCallIssue]
    Config(run=MeshConfig())  # pyright: ignore[reportArgumentType]
    null_attention(x, x)  # pyright: ignore[reportCallIssue]
    Attention(AttentionConfig())  # pyright: ignore[reportCallIssue]
    load_pretrained(3)  # pyright: ignore[reportArgumentType]
