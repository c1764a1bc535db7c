"""Bigram-Backcopy (arXiv 2410.13835), five seeds: sinks, value drains and residual peaks, and what takes them away.

Three layers, one head: the smallest model of tokens with all three. What OASIS gains over Softmax1 over tokens alone,
with and without the inter-layer signal, would show here.

    python -m oasis_jax study configs/study_backcopy.py --out runs/study_backcopy --workers 2

Hardware: two CPU cores, no download; 65 cells of about five minutes: a few hours. --minutes 10 does it in pieces.
Softmax alone forms the sink; where a residual peak is named, it may not have formed yet in these 2,800 steps.
"""

import dataclasses

from oasis_jax.commands.config_file import load_config
from oasis_jax.study import Claim, Outcome, Study, claims

SINK, PEAK, DRAIN = "non_trigger_first_token_mass_max", "residual_peak", "value_drain"
EIGHT_BITS, D_SINK = "quantized.w8a8_tensor.nats", "quantized.w8a8_tensor.d_sink"
FORMED = {SINK: 0.3}


def get_study() -> Study:
    base = load_config("backcopy")
    base = dataclasses.replace(base, run=dataclasses.replace(base.run, log_interval=50, telemetry_interval=0))
    cumulative = ("softmax1", "learned_sink", "gated", "oasis")
    oasis = "model.preset=oasis"
    return Study(
        title="Bigram-Backcopy: sinks, value drains, residual peaks",
        base=base,
        methods={
            "residual": (),
            "residual_softmax1": ("model.normalizer=softmax1",),
            "residual_learned_sink": ("model.normalizer=learned_sink",),
            "residual_affine": ("model.gate=affine",),
            "attnres": ("model.preset=attnres",),
            "attnres_cumulative": ("model.preset=attnres_cumulative",),
            **{name: (f"model.preset={name}",) for name in cumulative},
            "oasis_uncoupled": (oasis, "model.coupling=false"),
            "oasis_depth_softmax": (oasis, "model.depth_normalizer=softmax"),
            "oasis_blocks": ("model.preset=oasis_blocks", "model.blocks=3"),
        },
        twins={
            **dict.fromkeys(cumulative, "attnres_cumulative"),
            **dict.fromkeys(("oasis_uncoupled", "oasis_depth_softmax"), "oasis"),
            "oasis_blocks": "attnres",
        },
        seeds=(0, 1, 2, 3, 4),
        measures=("default", "values", "residual_sinks"),
        interventions=("beta",),
        schemes=("w8a8_tensor", "w8a8_tensor+sink_float", "w8a8"),
        outcomes=(
            Outcome("perplexity", "perplexity"),
            Outcome("trigger_excess_risk", "excess risk at triggers"),
            Outcome(SINK, "first-token mass, strongest head", relative=False),
            Outcome("non_trigger_null_mass", "null mass, no trigger", "none", relative=False),
            Outcome(DRAIN, "value norm, first / others", "none"),
            Outcome(PEAK, "residual norm, first / others"),
            Outcome("max_inf_norm", "max inf norm"),
            Outcome("avg_kurtosis", "mean kurtosis"),
            Outcome(EIGHT_BITS, "w8a8_tensor, nats", relative=False),
            Outcome(D_SINK, "D_sink, nats", relative=False),
            Outcome("without.beta.all.all", "nats without the signal", "none", relative=False),
        ),
        claims=_claims(),
    )


def _claims() -> tuple[Claim, ...]:
    softmax1 = "residual_softmax1"
    return (
        *claims.of_oasis(sink=SINK, eight_bits=EIGHT_BITS, formed=FORMED, uncoupled="oasis_uncoupled"),
        *claims.of_depth({"sinks": SINK, "8 bits": EIGHT_BITS}),
        Claim("Softmax1 takes the residual peak away", "2410.13835", PEAK, softmax1, "residual", needs=FORMED),
        Claim("Softmax1 weakens sinks", "2410.10781", SINK, softmax1, "residual", needs=FORMED),
        Claim("A learned sink weakens sinks", "2601.22966", SINK, "residual_learned_sink", "residual", needs=FORMED),
    )
