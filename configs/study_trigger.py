"""Every method on the no-op task (arXiv 2603.11487), five seeds, three kinds of begin token.

A head that has nothing to average needs a place to rest: the begin token's empty one (arm `begin`), one that carries
content which the means need (`content`), or none at all (`none`). The claims are those of OASIS (arXiv 2605.17887),
AttnRes' critics, Unified View (2601.22966) and K-bias (2410.10781), as far as a task of vectors can answer them.

    python -m oasis_jax study configs/study_trigger.py --out runs/study_trigger --workers 2

Hardware: two CPU cores, no download; 465 cells. Results: docs/results.md.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.study import Claim, Outcome, Study, claims

SINK, PEAK, KURTOSIS = "non_trigger_first_token_mass_max", "max_inf_norm", "avg_kurtosis"
ERROR, EIGHT_BITS = "squared_error", "quantized.w8a8_tensor.change"
FORMED = {SINK: 0.3}  # a head of the other method rests on the first token


def get_study() -> Study:
    base = Config(
        model=ModelConfig(
            preset="residual",
            inputs="vectors",
            num_layers=2,
            width=64,
            num_heads=1,
            norm="layernorm",
            rope_theta=0.0,
            learned_positions=32,
        ),
        data=DataConfig(corpus="trigger", sequence_length=32, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        run=RunConfig(steps=500, log_interval=50, telemetry_interval=0, checkpoint_interval=250),
    )
    return Study(
        title="The no-op task: where heads rest",
        base=base,
        arms={"begin": (), "content": ("data.begin_content=true",), "none": ("data.begin_token=false",)},
        methods=_methods(),
        twins={
            **dict.fromkeys(_CUMULATIVE, "attnres_cumulative"),
            **dict.fromkeys(("oasis_uncoupled", "oasis_depth_softmax", "oasis_fixed_beta"), "oasis"),
            **dict.fromkeys(("attnres_softmax1", "attnres_sigmoid", "attnres_uniform", "attnres_rms"), "attnres"),
            **dict.fromkeys(("preaffine", "gatednorm"), "rmsnorm"),
            "oasis_blocks": "attnres",
        },
        seeds=(0, 1, 2, 3, 4),
        measures=("default", "values"),
        schemes=("w8a8_tensor", "w4a8"),
        outcomes=(
            Outcome(ERROR, "squared error"),
            Outcome(SINK, "first-token mass, strongest head", relative=False),
            Outcome("non_trigger_null_mass", "null mass", "none", relative=False),
            Outcome(PEAK, "max inf norm"),
            Outcome(KURTOSIS, "mean kurtosis"),
            Outcome(EIGHT_BITS, "w8a8_tensor, change of error", relative=False),
            Outcome("quantized.w4a8.change", "w4a8, change of error", relative=False),
            Outcome("value_drain", "value norm, first / others", "none"),
            Outcome("residual_peak", "residual norm, first / others", "none"),
        ),
        claims=_claims(),
    )


_CUMULATIVE = (
    *("softmax1", "clipped", "entmax15", "sparsemax", "gated", "learned_sink", "null_key", "null_key_value"),
    *("token_null", "oasis"),
)


def _methods() -> dict[str, tuple[str, ...]]:
    presets = {name: (f"model.preset={name}",) for name in ("attnres", "attnres_cumulative", *_CUMULATIVE)}
    oasis = "model.preset=oasis"
    return {
        "residual": (),
        "residual_softmax1": ("model.normalizer=softmax1",),
        "residual_learned_sink": ("model.normalizer=learned_sink",),
        "residual_gated": ("model.gate=elementwise",),
        "residual_affine": ("model.gate=affine",),
        **presets,
        "oasis_uncoupled": (oasis, "model.coupling=false"),
        "oasis_depth_softmax": (oasis, "model.depth_normalizer=softmax"),
        "oasis_fixed_beta": (oasis, "model.fixed_beta=1.0"),
        "oasis_blocks": ("model.preset=oasis_blocks", "model.blocks=2"),
        "attnres_softmax1": ("model.preset=attnres", "model.depth_normalizer=softmax1"),
        "attnres_sigmoid": ("model.preset=attnres", "model.depth_normalizer=sigmoid"),
        "attnres_uniform": ("model.preset=attnres", "model.depth_normalizer=uniform"),
        "attnres_rms": ("model.preset=attnres_rms", "model.blocks=2"),
        "rmsnorm": ("model.norm=rmsnorm",),
        "preaffine": ("model.norm=preaffine",),
        "gatednorm": ("model.norm=gatednorm",),
        "dyt": ("model.norm=dyt",),
        "no_norm": ("model.norm=none",),
        "clip_3": ("model.residual_clip=3",),
    }


def _claims() -> tuple[Claim, ...]:
    return (
        *claims.of_oasis(sink=SINK, eight_bits=EIGHT_BITS, formed=FORMED, uncoupled="oasis_uncoupled"),
        *claims.of_depth({"sinks": SINK, "outliers": PEAK, "8 bits": EIGHT_BITS}),
        Claim("Softmax1 weakens sinks", "2410.10781, OutEffHop", SINK, "residual_softmax1", "residual", needs=FORMED),
        Claim(
            "A learned sink weakens sinks", claims.UNIFIED_VIEW, SINK, "residual_learned_sink", "residual", needs=FORMED
        ),
        Claim(
            "A gate on heads weakens sinks", "2306.12929, 2505.06708", SINK, "residual_gated", "residual", needs=FORMED
        ),
        Claim("Affine-scaled attention weakens sinks", "2602.23057", SINK, "residual_affine", "residual", needs=FORMED),
        Claim("GatedNorm loses less under W8A8", claims.UNIFIED_VIEW, EIGHT_BITS, "gatednorm", "rmsnorm"),
        Claim("PreAffine helps training", claims.UNIFIED_VIEW, ERROR, "preaffine", "rmsnorm"),
        Claim(
            "Clipping the residual stream hurts training",
            claims.UNIFIED_VIEW,
            ERROR,
            "clip_3",
            "residual",
            direction="higher",
        ),
        Claim("Removing norms hurts training", claims.UNIFIED_VIEW, ERROR, "no_norm", "residual", direction="higher"),
        Claim(
            "OASIS scores higher on GSM8K under W4A4",
            f"{claims.OASIS}: +12.42 %",
            untestable="a task of vectors has no words",
        ),
    )
