"""Quantization schemes of the literature as numerics of a model, and what they cost in perplexity."""

from oasis_jax.evaluation.quantization.calibration import (
    Calibration,
    Recorder,
    Recording,
    calibrate,
    calibration_for,
)
from oasis_jax.evaluation.quantization.inference import (
    ALWAYS_FLOAT,
    Quantized,
    check_texts,
    losses,
    quantization,
    quantized,
    rounded_tensors,
)
from oasis_jax.evaluation.quantization.schemes import OPTIONS, SCHEMES, Scheme, parse_scheme, parse_schemes

__all__ = [
    "ALWAYS_FLOAT",
    "OPTIONS",
    "SCHEMES",
    "Calibration",
    "Quantized",
    "Recorder",
    "Recording",
    "Scheme",
    "calibrate",
    "calibration_for",
    "check_texts",
    "losses",
    "parse_scheme",
    "parse_schemes",
    "quantization",
    "quantized",
    "rounded_tensors",
]
