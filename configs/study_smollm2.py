"""SmolLM2-135M-Instruct trained on six ways, from equal starts and for equal tokens: does its sink go, at what cost?

As it is; with Softmax1 at once; with its begin token as the null (a sink transplant), whose values stay or fade out;
with routers over depth that change nothing at their start (delta wiring, sum-preserving); and OASIS over blocks of
layers with the transplanted null for evidence. Models with a transplant read texts without a begin token, so that
their targets lie one token later. What the model is worth without training: configs/study_smollm2_forms.py.

    python -m oasis_jax.pretrained.smollm2
    python -m oasis_jax study configs/study_smollm2.py --out runs/study_smollm2 --workers 2

Hardware: two CPU cores and 12 GiB, a few hours for three seeds of 100 steps; --minutes 10 does it in pieces. The same
file serves a GPU. Results: docs/results.md.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.pretrained import smollm2
from oasis_jax.study import Claim, Outcome, Study

SINK, EIGHT_BITS, WHOLE = "sink_rate", "quantized.w16a8_tensor.nats", "quantized.w8a8_tensor.nats"
FORMED = {SINK: 0.03}


def get_study() -> Study:
    base = Config(
        model=ModelConfig(preset="residual"),
        data=DataConfig(tokenizer="library", sequence_length=256, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=10, weight_decay=0.0, router_multiplier=50.0),
        run=RunConfig(
            steps=100,
            init_from=str(smollm2.path()),
            log_interval=5,
            telemetry_interval=0,
            checkpoint_interval=25,
            keep_checkpoints=1,
        ),
    )
    transplant = ("model.normalizer=null_key_value", "run.init_null=transplant", "data.begin_token=false")
    return Study(
        title="SmolLM2-135M trained on: what becomes of its sink",
        base=base,
        methods={
            "as_it_is": (),
            "softmax1": ("model.normalizer=softmax1",),
            "transplant": transplant,
            "transplant_fade": (*transplant, "optimizer.null_value_fade_steps=50"),
            "delta": ("model.preset=attnres", "model.sum_preserving=true"),
            "oasis_blocks": ("model.preset=oasis_blocks", "model.blocks=6", *transplant),
        },
        twins={"transplant_fade": "transplant", "oasis_blocks": "transplant"},
        factors=("run.init_null", "data.begin_token", "optimizer.null_value_fade_steps"),
        seeds=(0, 1, 2),
        measures=("perplexity", "sinks", "outliers"),
        schemes=("w8a8_tensor", "w8a8_tensor+sink_float", "w16a8_tensor", "w16a8"),
        outcomes=(
            Outcome("perplexity", "perplexity"),
            Outcome(SINK, "sink rate", relative=False),
            Outcome("null_mass", "null mass", "none", relative=False),
            Outcome("max_inf_norm", "max inf norm"),
            Outcome("avg_kurtosis", "mean kurtosis"),
            Outcome(WHOLE, "w8a8_tensor, nats", relative=False),
            Outcome("quantized.w8a8_tensor.d_sink", "its D_sink, nats", relative=False),
            Outcome(EIGHT_BITS, "w16a8_tensor, nats", relative=False),
            Outcome("quantized.w16a8.nats", "w16a8, nats", relative=False),
        ),
        claims=_claims(),
    )


def _claims() -> tuple[Claim, ...]:
    at_once, delta = "Softmax1 at once weakens the sink", "Routers over depth that join a trained model make"
    return (
        Claim(at_once, "OutEffHop, 2410.10781", SINK, "softmax1", "as_it_is", needs=FORMED),
        Claim("A transplanted sink stays away", "ours", SINK, "transplant", "as_it_is", needs=FORMED),
        Claim("A transplant costs less under 8 bits, trained on", "ours", EIGHT_BITS, "transplant", "as_it_is"),
        Claim(
            "Fading the null's values costs perplexity", "ours", "perplexity", "transplant_fade", "transplant", "higher"
        ),
        Claim(f"{delta} 8 bits worse", "the claim under OASIS' claims", EIGHT_BITS, "delta", "as_it_is", "higher"),
        Claim(
            f"{delta} outliers worse", "the claim under OASIS' claims", "max_inf_norm", "delta", "as_it_is", "higher"
        ),
        Claim(
            "OASIS on blocks gains over the null alone", "OASIS (2605.17887)", EIGHT_BITS, "oasis_blocks", "transplant"
        ),
    )
