"""SmolLM2-135M-Instruct as it is, transplanted, rotated, and both: what 8 and 4 bits cost each, and where. No training.

128 sequences of 128 tokens of Python source, in eight parts that play the role of seeds. A sink transplant and a
rotation leave the function as it is, in float; a transplant into some heads, or with scaled values, does not.

    python -m oasis_jax.pretrained.smollm2
    python -m oasis_jax study configs/study_smollm2_forms.py --out runs/study_smollm2_forms --workers 2

Hardware: two CPU cores, 98 MB to fetch; 72 cells, a few hours. --minutes 10 does it in pieces, --methods some forms.
Results: docs/results.md.
"""

from oasis_jax.pretrained import find_prefix, rotate, smollm2, transplant_sink
from oasis_jax.pretrained.transplant import sink_heads
from oasis_jax.study import Claim, Form, Outcome, Source, Study

EIGHT_BITS, WHOLE = "quantized.w16a8_tensor.nats", "quantized.w8a8_tensor.nats"
SITES = ("attention.query", "attention.output", "mlp.gate", "mlp.down", "residual_sum", "attention.probabilities")


def found_prefix(model, rows):
    """The begin token, and the tokens at which massive activations are left."""
    return transplant_sink(model, find_prefix(model, rows))


def get_study() -> Study:
    rotated = "the residual stream turned, Hadamard blocks in the MLPs"
    return Study(
        title="SmolLM2-135M: what a sink transplant and a rotation mend",
        source=Source(model=str(smollm2.path())),
        methods={
            "as_it_is": Form("nothing", lambda model, rows: model),
            "begin": Form("the begin token is the null", lambda model, rows: transplant_sink(model)),
            "found": Form("a prefix found on calibration text is the null", found_prefix),
            "rotated": Form(rotated, lambda model, rows: rotate(model)),
            "begin_rotated": Form(f"begin; {rotated}", lambda model, rows: transplant_sink(rotate(model))),
            "found_rotated": Form(f"found; {rotated}", lambda model, rows: found_prefix(rotate(model), rows)),
            "heads": Form(
                "begin, in heads with more than .3 of their mass on it",
                lambda model, rows: transplant_sink(model, heads=sink_heads(model, rows)),
            ),
            "value_half": Form("begin, its values halved", lambda model, rows: transplant_sink(model, value_scale=0.5)),
            "value_none": Form("begin, its values 0", lambda model, rows: transplant_sink(model, value_scale=0.0)),
        },
        seeds=tuple(range(8)),
        measures=("perplexity", "sinks", "outliers"),
        schemes=(
            *("w8a8_tensor", "w8a8_tensor+sink_float", "w16a8_tensor", "w16a8_tensor_static", "w16a6_tensor"),
            *("w16a8", "w16a4", "w8a8", "w4a4_g32"),
            *(f"w8a8_tensor@{site}" for site in SITES),
        ),
        outcomes=(
            Outcome("perplexity", "perplexity"),
            Outcome("sink_rate", "sink rate", relative=False),
            Outcome("null_mass", "null mass", "none", relative=False),
            Outcome("max_inf_norm", "max inf norm"),
            Outcome("avg_kurtosis", "mean kurtosis"),
            Outcome(WHOLE, "w8a8_tensor, nats", relative=False),
            Outcome("quantized.w8a8_tensor.d_sink", "its D_sink, nats", relative=False),
            *(
                Outcome(f"quantized.{scheme}.nats", f"{scheme}, nats", relative=False)
                for scheme in (
                    "w16a8_tensor",
                    "w16a8_tensor_static",
                    "w16a6_tensor",
                    "w16a8",
                    "w16a4",
                    "w8a8",
                    "w4a4_g32",
                )
            ),
            *(Outcome(f"quantized.w8a8_tensor@{site}.nats", f"only {site}, nats", relative=False) for site in SITES),
        ),
        claims=_claims(),
    )


def _claims() -> tuple[Claim, ...]:
    prefix, quarot = "PrefixQuant (2410.05265)", "QuaRot (2404.00456)"
    return (
        Claim("A transplanted sink costs less under int8 per tensor", prefix, EIGHT_BITS, "begin", "as_it_is"),
        Claim("A found prefix costs less than the begin token", prefix, EIGHT_BITS, "found", "begin"),
        Claim("A rotation costs less under int8 per tensor", quarot, EIGHT_BITS, "rotated", "as_it_is"),
        Claim(
            "Both cost less than the rotation alone",
            "measured before, 24 sequences",
            EIGHT_BITS,
            "found_rotated",
            "rotated",
        ),
        Claim(
            "Both cost less than the transplant alone",
            "measured before, 24 sequences",
            EIGHT_BITS,
            "found_rotated",
            "found",
        ),
        Claim(
            "A transplant into strong heads alone makes the next token a sink",
            "measured before, 24 sequences",
            EIGHT_BITS,
            "heads",
            "begin",
            "higher",
        ),
        Claim(
            "Without its values the sink comes back", "measured before", "perplexity", "value_none", "begin", "higher"
        ),
    )
