"""Attention with a null through cuDNN's fused softmax attention, which knows nothing of a null.

Forward: with cuDNN's lse0 over the keys, the output is its output times sigmoid(lse0 - b). Backward: given our lse,
cuDNN recomputes our probabilities; its own delta, rowsum(dO * O), becomes ours when it is handed O' = delta * dO /
|dO|^2 for O, which it uses for nothing else. A row whose dO vanishes beside its delta, as under a loss on the null mass
alone, receives a tiny dO and an O' whose product with it is delta: dP and dV change by a share of delta that the dtype
hardly resolves.

The call is private to JAX; where a version lacks it in the form used here, the backend says so.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unavailable, target_device
from pallas_kernels.null_attention.base import AttentionInputs, Masks, NullAttention, Options, check_kernel
from pallas_kernels.null_attention.vjp import differentiable

_FORWARD = (
    "query",
    "key",
    "value",
    "bias",
    "q_seqlen",
    "kv_seqlen",
    "q_offsets",
    "kv_offsets",
    "page_table_k",
    "page_table_v",
)
_BACKWARD = (*_FORWARD, "activation", "fwd_output", "grad_output")
_OPTIONS = {"scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length"}
_NEWER = {
    "score_mod_args",
    "score_mod",
}  # since jax 0.11, and only in the functions' signatures: without a score_mod nothing is bound

_TOO_OLD = re.compile(r"\b(P100|P40|P4|V100|T4)\b")

# A dO is replaced where it is smaller than this share of delta, by one of this share: O' stays below its inverse, which
# the dtype holds.
_SHARE = {jnp.dtype(jnp.bfloat16): 2.0**-24, jnp.dtype(jnp.float16): 2.0**-14}


def _check_available(inputs: AttentionInputs) -> None:
    query, key, options = inputs.query, inputs.key, inputs.options
    device = target_device()
    if device.platform != "gpu":
        raise Unavailable(f"runs on NVIDIA GPUs only, the call is compiled for {device.platform}")
    if "NVIDIA" not in device.kind or _TOO_OLD.search(device.kind):
        raise Unavailable(
            f"runs on NVIDIA GPUs of the Ampere generation or newer, the call is compiled for {device.kind}"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unavailable(f"computes in bfloat16 and float16, the inputs are {query.dtype}")
    if query.shape[3] > 128 or query.shape[3] % 8:
        raise Unavailable(f"the head size must be a multiple of 8 up to 128, it is {query.shape[3]}")
    check_kernel(inputs)
    if inputs.masks.segments is not None:
        raise Unavailable("has no segment ids")
    if options.softcap is not None:
        raise Unavailable("has no soft cap of the logits")
    if (options.causal or options.window is not None) and query.shape[1] != key.shape[1]:
        raise Unavailable(f"a causal mask needs as many queries as keys, got {query.shape[1]} and {key.shape[1]}")
    if key.shape[1] == 0:
        raise Unavailable("there are no keys")
    _private_calls()


@functools.cache
def _private_calls():
    """JAX's module and whether its functions know score_mod; raises Unavailable where they are not what this file
    expects.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as module

        forward, backward = (
            set(inspect.signature(getattr(module, f"_dot_product_attention_{name}_impl")).parameters)
            for name in ("fwd", "bwd")
        )
        for name in (
            "_dot_product_attention_fwd_p_wrapper",
            "_dot_product_attention_bwd_p_wrapper",
            "AttentionLayout",
            "MaskType",
        ):
            getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"jax {jax.__version__} lacks the private call to cuDNN: {error}") from None
    wanted = ({*_FORWARD, *_OPTIONS, "is_training"}, {*_BACKWARD, *_OPTIONS})
    if not all(want <= have <= want | _NEWER for want, have in zip(wanted, (forward, backward))):
        raise Unavailable(f"jax {jax.__version__} calls cuDNN with other arguments than this backend knows")
    return module, "score_mod" in forward


def _arguments(options: Options, dtype):
    """The unused array arguments and the static ones of both calls."""
    module, has_score_mod = _private_calls()
    causal = options.causal or options.window is not None
    unused = [jnp.zeros(0, dtype)] * 7
    static = dict(
        scale=options.scale,
        seed=42,  # of a dropout that is off
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=module.MaskType.CAUSAL if causal else module.MaskType.NO_MASK,
        layout=module.AttentionLayout.BTNH.value,
        sliding_window_length=options.window,
    )
    return module, unused, static | ({"score_mod": None} if has_score_mod else {})


def softmax_attention(options: Options, query, key, value) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """cuDNN's output and the lse of the scores."""
    module, unused, static = _arguments(options, query.dtype)
    return tuple(
        module._dot_product_attention_fwd_p_wrapper.bind(query, key, value, *unused, **static, is_training=True)
    )


def softmax_attention_backward(options: Options, query, key, value, lse, output, d_output):
    """cuDNN's gradients of query, key and value, given lse and an output whose product with d_output is delta."""
    module, unused, static = _arguments(options, query.dtype)
    return tuple(
        module._dot_product_attention_bwd_p_wrapper.bind(query, key, value, *unused, lse, output, d_output, **static)
    )


def _forward(
    options: Options, query, key, value, null_logit, masks: Masks
) -> tuple[NullAttention, Float[Array, "B N T"]]:
    softmax_output, attended = softmax_attention(options, query, key, value)
    b = null_logit.astype(jnp.float32)[None, :, None]
    lse, mass = jnp.logaddexp(attended, b), jax.nn.sigmoid(attended - b)
    output = softmax_output.astype(jnp.float32) * mass.swapaxes(1, 2)[..., None]
    return NullAttention(output.astype(query.dtype), jnp.exp(b - lse), lse), mass


def inject_delta(d_output: Float[Array, "B T N H"], delta: Float[Array, "B N T"]):
    """An output and a d_output, [B, T, N, H] in the dtype of d_output, whose products summed over H are delta."""
    dtype, info = d_output.dtype, jnp.finfo(d_output.dtype)
    delta = delta.swapaxes(1, 2)[..., None]
    d_out = d_output.astype(jnp.float32)
    largest = jnp.abs(d_out).max(-1, keepdims=True)
    vanished = largest <= _SHARE[dtype] * jnp.abs(delta)  # also where both are zero

    size = jnp.where(vanished, 1.0, largest)
    direction = d_out / size  # squares of the entries themselves could underflow
    square = jnp.where(vanished, 1.0, (direction * direction).sum(-1, keepdims=True))
    output = delta / size * (direction / square)

    # two entries carry delta with twice the precision of the dtype; float16 reaches down to its subnormal numbers
    least = info.smallest_subnormal if dtype == jnp.float16 else info.tiny
    tiny = jnp.ldexp(_SHARE[dtype], jnp.frexp(delta)[1] - 1)  # a power of two, which the dtype holds exactly
    tiny = jnp.maximum(tiny, float(least))
    high = lax.reduce_precision(delta / tiny, info.nexp, info.nmant)
    entry = jnp.arange(d_output.shape[-1])[None, None, None]
    stand_in = jnp.where(entry == 0, high, jnp.where(entry == 1, delta / tiny - high, 0.0))
    d_stand_in = jnp.where((entry < 2) & (delta != 0.0), tiny, 0.0)
    return tuple(jnp.where(vanished, new, old).astype(dtype) for new, old in ((stand_in, output), (d_stand_in, d_out)))


def _backward(options: Options, query, key, value, masks: Masks, lse, delta, d_output):
    output, d_output = inject_delta(d_output, delta)
    return softmax_attention_backward(options, query, key, value, lse, output, d_output)


_serve = differentiable(_forward, _backward, kernels="cudnn")


def null_attention_cudnn(inputs: AttentionInputs) -> NullAttention:
    """The contract of `null_attention` through cuDNN: bfloat16 or float16, causal, windowed or neither, no
    segments and no soft cap: some query sees every key.
    """
    _check_available(inputs)
    return _serve(inputs)
