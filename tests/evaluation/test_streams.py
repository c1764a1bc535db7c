"""Massive activations, residual sinks, value drain and per-token kurtosis, against numpy."""

import jax
import numpy as np
import pytest
from evaluation.toys import ROUNDING, build, forward, measure_family, token_batches

from oasis_jax.evaluation import measure
from oasis_jax.evaluation.measures.order_statistics import kth_smallest, median
from oasis_jax.model.statistics import Statistics


@pytest.mark.parametrize("size", [1, 2, 5, 8, 1001])
def test_order_statistics_are_those_of_a_sort(size):
    random = np.random.default_rng(size)
    x = np.abs(random.standard_normal((3, size)) * 10.0 ** random.integers(-30, 30, (3, size))).astype(np.float32)
    x[0, : size // 2] = 0.0
    x[1] = np.round(x[1] % 4)  # many equal ones
    for k in {0, size // 3, size - 1}:
        np.testing.assert_array_equal(jax.jit(kth_smallest, static_argnums=1)(x, k), np.sort(x)[:, k])
    np.testing.assert_allclose(jax.jit(median)(x), np.median(x.astype(np.float64), -1), rtol=1e-6)


def measure_streams(streams: list[np.ndarray], family: str) -> dict:
    """A family of measures of layer outputs [B, T, D] that are given instead of computed."""
    batches = [{"inputs": np.zeros(streams[0].shape[:2], np.float32)}]
    return measure(
        lambda h, inputs: (inputs, Statistics([], {}, {"layer_output": h})), streams, batches, measures=[family]
    ).values


def streams_with_giants() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    streams = [0.1 * random.standard_normal((2, 7, 9)).astype(np.float32) for _ in range(3)]
    streams[1][0, 0, 4] = -150.0
    streams[1][1, 3, 4] = 120.0
    streams[1][1, 3, 2] = 99.0  # large, not massive
    streams[2] *= 20.0
    streams[2][0, 5, 8] = 140.0  # more than 100, less than 1000 medians
    return streams


def test_massive_activations_are_counted_and_placed():
    streams = streams_with_giants()
    found = measure_streams(streams, "massive")
    assert found["massive_activations_by_layer"] == [0.0, 1.0, 0.0] and found["massive_activations"] == 1.0
    assert found["massive_activation_places"] == [{"layer": 1, "positions": {"0": 1, "3": 1}, "channels": {"4": 2}}]
    largest = found["largest_activation_by_layer"]
    assert [(largest[i]["value"], largest[i]["position"], largest[i]["channel"]) for i in (1, 2)] == [
        (-150.0, 0, 4),
        (140.0, 5, 8),
    ]
    ratios = [[np.abs(h[b]).max() / np.median(np.abs(h[b])) for b in range(2)] for h in streams]
    assert largest[2]["ratio_to_median"] == pytest.approx(ratios[2][0], rel=1e-5)
    assert found["largest_activation_ratio"] == pytest.approx(np.mean(ratios, 1).max(), rel=1e-5)


def test_residual_sinks_equal_numpy():
    model, batches = build(preset="oasis", num_layers=3), token_batches()
    streams = np.stack(forward(model, batches)[1].taps["layer_output"]).astype(np.float64)  # [L, B, T, D]
    found = measure_family("residual_sinks", model, batches)
    mean = np.abs(streams).mean((1, 2))
    channels = mean.argmax(-1)
    assert found["residual_sink_channel_by_layer"] == channels.tolist()
    np.testing.assert_allclose(found["residual_sink_ratio_by_layer"], mean.max(-1) / np.median(mean, -1), rtol=1e-4)
    assert found["residual_sink_ratio"] == pytest.approx((mean.max(-1) / np.median(mean, -1)).max(), rel=1e-4)
    at = [np.abs(h[..., d]) for h, d in zip(streams, channels)]
    shares = [(np.abs(h).argmax(-1) == d).mean() for h, d in zip(streams, channels)]
    np.testing.assert_allclose(found["residual_sink_share_by_layer"], shares, atol=ROUNDING)
    norm_shares = [(x / np.linalg.norm(h, axis=-1)).mean() for h, x in zip(streams, at)]
    np.testing.assert_allclose(found["residual_sink_norm_share_by_layer"], norm_shares, rtol=1e-4)
    assert found["residual_sink_share"] == pytest.approx(max(shares)) and found[
        "residual_sink_norm_share"
    ] == pytest.approx(max(norm_shares))
    norms = [*(layer.attention_norm for layer in model.layers[1:]), model.final_norm]
    gains = [np.abs(np.asarray(norm.parameters["scale"])) for norm in norms]
    np.testing.assert_allclose(
        found["norm_gain_at_sink"], [g[d] / np.median(g) for g, d in zip(gains, channels)], rtol=1e-5
    )


def test_norm_without_a_gain_is_not_applicable():
    found = measure_family("residual_sinks", build(preset="residual", norm="none"), token_batches(1))
    assert found["norm_gain_at_sink"] is None


def test_values_and_peaks_equal_numpy():
    model, batches = build(preset="residual"), token_batches()
    _, statistics = forward(model, batches)
    found = measure_family("values", model, batches)
    value = np.linalg.norm(
        np.stack([layer.value for layer in statistics.attention], 1).astype(np.float64), axis=-1
    )  # [B, L, T, K]
    drain = value[:, :, 0] / value[:, :, 1:].mean(2)
    np.testing.assert_allclose(found["value_drain_by_head"], drain.mean(0), rtol=1e-4)
    stream = np.linalg.norm(np.stack(statistics.taps["layer_output"], 1).astype(np.float64), axis=-1)
    peak = stream[:, :, 0] / stream[:, :, 1:].mean(2)
    np.testing.assert_allclose(found["residual_peak_by_layer"], peak.mean(0), rtol=1e-4)
    heads = np.linalg.norm(
        np.stack([layer.head_output for layer in statistics.attention], 1).astype(np.float64), axis=-1
    )
    np.testing.assert_allclose(found["head_output_norm_by_head"], heads.mean((0, 2)), rtol=1e-4)
    for name, values in {"value_drain": drain, "residual_peak": peak, "head_output_norm": heads}.items():
        assert found[name] == pytest.approx(values.mean(), rel=1e-4)


def test_token_kurtosis_equals_numpy():
    model, batches = build(preset="oasis"), token_batches()
    taps = forward(model, batches)[1].taps
    found = measure_family("token_kurtosis", model, batches)
    expected = {}
    for kind, layers in taps.items():
        wide = np.stack(layers).astype(np.float64)
        centred = wide - wide.mean(-1, keepdims=True)
        expected[kind] = ((centred**4).mean(-1) / (wide.std(-1, ddof=1) ** 4 + 1e-6)).mean((1, 2))
        np.testing.assert_allclose(found["token_kurtosis_by_tap"][kind], expected[kind], rtol=1e-4)
    every = np.concatenate(list(expected.values()))
    assert found["avg_token_kurtosis"] == pytest.approx(every.mean(), rel=1e-4)
    assert found["max_token_kurtosis"] == pytest.approx(every.max(), rel=1e-4)
