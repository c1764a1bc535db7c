"""The GPU backends of null_attention: cuDNN with its two calls emulated in plain JAX, and the Hopper kernels
in Pallas' interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from pallas_kernels import explain, null_attention
from pallas_kernels.dispatch import Device
from pallas_kernels.null_attention import cudnn

HERE = Path(__file__).parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_of_gpus", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


suite, options_suite = load("test_null_attention"), load("plain_attention")

H100 = Device("gpu", "NVIDIA H100 80GB HBM3")
OLD_JAX = jax.__version_info__ < (0, 11, 2)
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 12),  # 0.11 refuses barriers whose last phase nobody waits for
    reason=f"the interpreter runs the kernels from jax 0.12 on, this is jax {jax.__version__}",
)
TOLERANCE = {"bfloat16": 2.0**-7, "float16": 2.0**-10}


@pytest.fixture
def h100(monkeypatch):
    """Backends believe that calls are compiled for an H100."""
    for backend in ("cudnn", "mosaic_gpu"):
        monkeypatch.setattr(sys.modules[f"pallas_kernels.null_attention.{backend}"], "target_device", lambda: H100)


def _probabilities(options, query, key, lse):
    """exp(score - lse), float32, [B, K, G, T, S]; with lse None, the scores, -inf where the mask hides them."""
    (batch, length, heads, size), (_, keys, key_heads, _) = query.shape, key.shape
    q = query.astype(jnp.float32).reshape(batch, length, key_heads, heads // key_heads, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, key.astype(jnp.float32), precision="highest") * options.scale
    if options.causal or options.window:
        distance = np.arange(length)[:, None] - np.arange(keys)
        scores = jnp.where((distance >= 0) & (distance < (options.window or keys)), scores, -jnp.inf)
    return scores if lse is None else jnp.exp(scores - lse.reshape(*scores.shape[:-1], 1))


def emulated_forward(options, query, key, value):
    """What cuDNN's softmax attention returns: output in the inputs' dtype and lse in float32."""
    scores = _probabilities(options, query, key, None)
    lse = jax.nn.logsumexp(scores, axis=-1)
    output = jnp.einsum(
        "bkgts,bskh->btkgh", jnp.exp(scores - lse[..., None]), value.astype(jnp.float32), precision="highest"
    )
    return output.reshape(query.shape).astype(query.dtype), lse.reshape(lse.shape[0], -1, lse.shape[-1])


def emulated_backward(options, query, key, value, lse, output, d_output):
    """What cuDNN's backward computes: it forms delta from the output that it is given."""
    assert {x.dtype for x in (output, d_output)} == {query.dtype}
    p = _probabilities(options, query, key, lse)
    grouped = lambda x: x.astype(jnp.float32).reshape(*x.shape[:2], key.shape[2], -1, x.shape[-1])
    q, out, d_out = map(grouped, (query, output, d_output))
    delta = jnp.einsum("btkgh,btkgh->bkgt", out, d_out, precision="highest")
    d_p = jnp.einsum("btkgh,bskh->bkgts", d_out, value.astype(jnp.float32), precision="highest")
    d_s = p * (d_p - delta[..., None]) * options.scale
    d_query = jnp.einsum("bkgts,bskh->btkgh", d_s, key.astype(jnp.float32), precision="highest").reshape(query.shape)
    d_key = jnp.einsum("bkgts,btkgh->bskh", d_s, q, precision="highest")
    d_value = jnp.einsum("bkgts,btkgh->bskh", p, d_out, precision="highest")
    return tuple(x.astype(query.dtype) for x in (d_query, d_key, d_value))


CUDNN_CASES = {
    "causal_grouped": dict(shape=(2, 37, 37, 6, 2, 8), per_head=True),
    "window": dict(shape=(1, 43, 43, 3, 1, 16), window=9, null_logit=-1.5, scale=0.4),
    "both_directions": dict(shape=(2, 17, 29, 3, 3, 24), is_causal=False, null_logit=0.7),
    "softmax": dict(shape=(2, 19, 19, 3, 1, 8), null_logit=-np.inf),
}


def weights(name: str, cotangents):
    """Cotangents: all three results', the null mass' alone, or with rows whose output has none or next to none."""
    d_output, d_null_mass, d_lse = cotangents
    rows = np.arange(d_output.shape[1]) % 3
    chosen = {
        "all": (d_output, d_null_mass, d_lse),
        "null_mass_alone": (0 * d_output, d_null_mass, 0 * d_lse),
        "zero_rows": (d_output * (rows == 0)[:, None, None], d_null_mass, 0 * d_lse),
        "faint_rows": (d_output * np.where(rows == 0, 1.0, 1e-6)[:, None, None], d_null_mass, d_lse),
    }
    return chosen[name]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "name, loss",
    [
        *((name, "all") for name in CUDNN_CASES),
        *(("causal_grouped", loss) for loss in ("null_mass_alone", "zero_rows", "faint_rows")),
    ],
)
def test_cudnn_with_our_lse_and_delta_is_attention_with_a_null(monkeypatch, h100, name, loss, dtype):
    monkeypatch.setattr(cudnn, "softmax_attention", emulated_forward)
    monkeypatch.setattr(cudnn, "softmax_attention_backward", emulated_backward)
    arrays, options, cotangents = suite.make(**CUDNN_CASES[name])
    d_output, *rest = weights(loss, cotangents)
    halves = [jnp.asarray(x, dtype) for x in arrays[:3]]
    cotangents = (jnp.asarray(d_output, dtype), *(jnp.asarray(x, jnp.float32) for x in rest))
    b = jnp.broadcast_to(arrays[3], (arrays[0].shape[2],))
    values, gradients = suite.results_and_gradients(
        lambda q, k, v, b: null_attention(q, k, v, null_logit=b, implementation="cudnn", **options),
        (*halves, b),
        cotangents,
    )
    with jax.enable_x64(True):
        wanted, wanted_gradients = suite.results_and_gradients(
            lambda q, k, v, b: suite.plain(q, k, v, b, **options),
            suite.as_float64((*halves, b)),
            suite.as_float64(cotangents),
        )
    suite.assert_close(values[0], wanted[0], TOLERANCE[dtype])
    for actual, want in zip(values[1:], wanted[1:]):
        suite.assert_close(actual, want, 2e-6)
    assert [x.dtype for x in gradients[:3]] == [jnp.dtype(dtype)] * 3
    if np.isneginf(b).all():
        assert np.all(np.asarray(gradients[3]) == 0)
        gradients, wanted_gradients = gradients[:3], wanted_gradients[:3]
    # the value's gradient is zero under a loss on the null mass alone: its error is measured beside the other gradients
    largest = max(float(np.abs(x).max()) for x in wanted_gradients)
    for actual, want in zip(gradients, wanted_gradients):
        error = np.abs(np.asarray(actual, np.float64) - np.asarray(want)).max()
        assert error <= 2 * TOLERANCE[dtype] * (float(np.abs(want).max()) or largest), error


def test_cudnn_with_null_keys_and_values_outside(monkeypatch, h100):
    monkeypatch.setattr(cudnn, "softmax_attention", emulated_forward)
    monkeypatch.setattr(cudnn, "softmax_attention_backward", emulated_backward)
    arrays, _, cotangents = options_suite.make((2, 37, 37, 6, 2, 8), null="per_query", null_keys=3, null_values=3)
    halves = {name: x if name == "null_logit" else jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    cotangents = (jnp.asarray(cotangents[0], jnp.bfloat16), *cotangents[1:])
    function = lambda a: null_attention(
        *(a[name] for name in ("query", "key", "value")), implementation="cudnn",
        **{name: a[name] for name in ("null_logit", "null_key", "null_value")},
    )  # fmt: skip
    values, gradients = options_suite.results_and_gradients(function, halves, cotangents)
    wanted, wanted_gradients = options_suite.expected(halves, {}, cotangents)
    suite.assert_close(values[0], wanted[0], 2 * TOLERANCE["bfloat16"])
    for actual, want in zip(values[1:], wanted[1:]):
        suite.assert_close(actual, want, 2e-6)
    for name in gradients:
        suite.assert_close(gradients[name], wanted_gradients[name], 3 * TOLERANCE["bfloat16"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_injected_products_sum_to_delta(dtype):
    random = np.random.default_rng(0)
    scale = 10.0 ** random.integers(-12, 3, (3, 41, 5, 1))
    d_output = jnp.asarray(random.normal(size=(3, 41, 5, 16)) * scale * random.integers(0, 2, (3, 41, 5, 1)), dtype)
    delta = (
        jnp.asarray(random.normal(size=(3, 5, 41)) * 10.0 ** random.integers(-9, 1, (3, 5, 41)), jnp.float32)
        .at[:, 2]
        .set(0.0)
    )
    output, d_output = (np.asarray(x, np.float64) for x in jax.jit(cudnn.inject_delta)(d_output, delta))
    assert np.isfinite(output).all() and np.isfinite(d_output).all()
    error = np.abs((output * d_output).sum(-1).swapaxes(1, 2) - np.asarray(delta))
    # an entry of float16 is no finer than its smallest subnormal number
    floor = 0.0 if dtype == "bfloat16" else 2.0**-24 * np.abs(d_output).sum(-1).swapaxes(1, 2)
    assert np.all(error <= TOLERANCE[dtype] * np.abs(delta) + floor)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"is_causal": False}], ids=["causal", "window", "full"])
def test_cudnn_lowers_to_its_custom_calls(h100, options):
    shapes = [jax.ShapeDtypeStruct((2, 64, heads, 64), jnp.bfloat16) for heads in (6, 2, 2)]

    def loss(query, key, value, b):
        output, null_mass, _ = null_attention(query, key, value, null_logit=b, implementation="cudnn", **options)
        return output.astype(jnp.float32).sum() + null_mass.sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*shapes, jax.ShapeDtypeStruct((6,), jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text


HALF = dict(shape=(2, 70, 70, 6, 2, 64), dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    "backend, change, reason",
    [
        ("cudnn", dict(device=Device("cpu", "cpu")), "runs on NVIDIA GPUs only, the call is compiled for cpu"),
        ("cudnn", dict(device=Device("gpu", "Tesla V100-SXM2-16GB")), "Ampere"),
        ("cudnn", dict(dtype=jnp.float32), "bfloat16 and float16"),
        ("cudnn", dict(shape=(2, 70, 70, 6, 2, 256)), "head size must be a multiple of 8 up to 128, it is 256"),
        ("cudnn", dict(shape=(2, 70, 90, 6, 2, 64)), "as many queries as keys, got 70 and 90"),
        ("cudnn", dict(logit_softcap=3.0), "soft cap"),
        ("cudnn", dict(segment_ids=np.zeros((2, 70), np.int32)), "segment"),
        ("mosaic_gpu", dict(device=Device("cpu", "cpu")), "runs on Hopper GPUs only, the call is compiled for cpu"),
        ("mosaic_gpu", dict(device=Device("gpu", "NVIDIA A100-SXM4-80GB")), "runs on Hopper GPUs only"),
        ("mosaic_gpu", dict(device=Device("gpu", "NVIDIA H1000")), "runs on Hopper GPUs only"),
        ("mosaic_gpu", dict(dtype=jnp.float32), "bfloat16 and float16"),
        *(
            ("mosaic_gpu", dict(shape=(2, 70, 70, 6, 2, size)), rf"head size must be one of \(64, .*; it is {size}")
            for size in (56, 100, 264)
        ),
        ("mosaic_gpu", dict(shape=(2, 70, 0, 6, 2, 64)), "there are no keys"),
    ],
)
def test_what_a_backend_cannot_serve_it_names(monkeypatch, backend, change, reason):
    options = HALF | dict(device=H100) | change
    (batch, length, keys, heads, key_heads, size), dtype, device = (
        options.pop(name) for name in ("shape", "dtype", "device")
    )
    monkeypatch.setattr(sys.modules[f"pallas_kernels.null_attention.{backend}"], "target_device", lambda: device)
    if backend == "mosaic_gpu" and OLD_JAX:
        reason = f"mosaic_gpu: needs jax 0.11.2 or newer, this is jax {jax.__version__}"
    arrays = [jnp.zeros((batch, n, h, size), dtype) for n, h in ((length, heads), (keys, key_heads), (keys, key_heads))]
    with pytest.raises(ValueError, match=reason):
        null_attention(*arrays, implementation=backend, **options)


@pytest.mark.parametrize(
    "size, options, serves", [(128, {}, "cudnn"), (256, {}, "xla"), (128, dict(logit_softcap=3.0), "xla")]
)
def test_what_serves_blackwell_is_named(size, options, serves):
    blackwell = AbstractDevice(device_kind="NVIDIA B200", num_cores=148, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=blackwell)
    shape = jax.ShapeDtypeStruct((2, 70, 6, size), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        explanation = explain("null_attention", shape, shape, shape, **options)
    assert explanation.implementation == serves and f"{serves}: runs\n" in str(explanation)
    if not OLD_JAX:
        wanted = "runs on Hopper GPUs only, the call is compiled for NVIDIA B200, which cudnn or xla serve"
        assert explanation.reasons["mosaic_gpu"] == wanted


def test_a_changed_private_call_is_named(monkeypatch, h100):
    from jax._src.cudnn import fused_attention_stablehlo as module

    shape = jax.ShapeDtypeStruct((2, 70, 6, 64), jnp.bfloat16)
    for name, broken, reason in (
        ("_dot_product_attention_fwd_p_wrapper", None, "lacks the private call to cuDNN"),
        (
            "_dot_product_attention_bwd_impl",
            lambda query, key: None,
            "calls cuDNN with other arguments than this backend knows",
        ),
    ):
        with monkeypatch.context() as patch:
            if broken is None:
                patch.delattr(module, name)
            else:
                patch.setattr(module, name, broken)
            cudnn._private_calls.cache_clear()
            assert reason in explain("null_attention", shape, shape, shape).reasons["cudnn"]
    cudnn._private_calls.cache_clear()
    assert explain("null_attention", shape, shape, shape).implementation == "cudnn"


@pytest.mark.parametrize("backend, length", [("cudnn", 70), ("xla", 70), ("mosaic_gpu", 70), ("mosaic_gpu", 3)])
def test_gradients_inside_shard_map_have_the_arguments_types(backend, length):
    if backend == "mosaic_gpu" and OLD_JAX:
        pytest.skip(f"the kernels need jax 0.11.2 or newer, this is jax {jax.__version__}")
    hopper = AbstractDevice(device_kind=H100.kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=hopper)
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor")
    shapes = [jax.ShapeDtypeStruct((2, n, h, 64), jnp.bfloat16) for n, h in ((length, 6), (70, 2), (70, 2))]
    shapes.append(jax.ShapeDtypeStruct((6,), jnp.float32))

    def loss(*arrays):
        attend = lambda q, k, v, b: tuple(null_attention(q, k, v, null_logit=b, implementation=backend))
        specs = (heads, heads, heads, PartitionSpec("tensor"))
        output, null_mass, _ = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads, rows, rows))(*arrays)
        return output.astype(jnp.float32).sum() + null_mass.sum()

    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2, 3)), *shapes)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in shapes]


def interpreted(*names: str) -> dict:
    """The report of interpret_null_attention_gpu.py; without the pool's threads the interpreter would wait for ever."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "4"}
    command = [sys.executable, HERE / "interpret_null_attention_gpu.py", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert list(report) == list(names) and not any(case.pop("races") for case in report.values())
    return report


def assert_small(errors: dict, dtype: str = "bfloat16") -> None:
    for name, error in errors.items():
        assert error <= (2e-6 if name in ("null_mass", "lse") else TOLERANCE[dtype]), (name, error)


@needs_interpreter
def test_kernels_equal_the_plain_definition():
    report = interpreted("causal_grouped", "segments_softcap_both_directions", "loss_on_the_null_mass", "head_80")
    assert report["loss_on_the_null_mass"].pop("value") == 0.0
    for errors in report.values():
        assert_small(errors)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("head_128_float16_more_keys", "float16"),
        ("head_96", "bfloat16"),
        ("head_112", "bfloat16"),
        ("head_192", "bfloat16"),
        ("head_256", "bfloat16"),
        ("window", "bfloat16"),
        ("window_segments_more_queries", "bfloat16"),
        ("decoding", "bfloat16"),
        ("decoding_window_segments", "bfloat16"),
    ],
)
def test_every_head_size_mask_and_decoding_equal_the_plain_definition(name, dtype):
    assert_small(interpreted(name)[name], dtype)


@needs_interpreter
def test_kernels_at_extreme_scores_and_rows_without_keys():
    report = interpreted("extreme_scores", "empty_rows")
    wanted = {"1 0.0": [2.0, 0.0, 1e4 + np.log(3.0)], "1 -inf": [2.0, 0.0, 1e4 + np.log(3.0)]}
    wanted |= {"-1 0.0": [0.0, 1.0, 0.0], "-1 -inf": [2.0, 0.0, np.log(3.0) - 1e4]}
    for name, (*values, finite) in report["extreme_scores"].items():
        assert finite
        np.testing.assert_allclose(values, wanted[name], rtol=1e-6)
    assert report["empty_rows"] == {"0.5": [0.0, 0.0, 1.0, 0.5, True], "-inf": [0.0, 0.0, 0.0, -np.inf, True]}


@needs_interpreter
@pytest.mark.slow
def test_what_no_query_may_see_never_matters():
    assert interpreted("unseen")["unseen"] == {"window": 0.0, "segments": 0.0, "decoding": 0.0}


@needs_interpreter
@pytest.mark.slow
def test_kernels_under_vmap():
    assert interpreted("vmapped")["vmapped"] == {"query": 0.0, "null_logit": 0.0}
