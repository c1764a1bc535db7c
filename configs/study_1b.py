"""OASIS' claims at a billion parameters, on the paper's corpora (BookCorpus and Wikipedia), from scratch: eight GPUs or
a slice of 16 TPU v5e.

    python -m oasis_jax prepare --source hf:bookcorpus --source hf:wiki40b/en --tokenizer bpe \
        --set data.bpe_vocab_size=32768 --set data.holdout_fraction=0.005 --out data/bookcorpus_wiki40b
    python -m oasis_jax study configs/study_1b.py --out runs/study_1b --minutes 600
    python -m oasis_jax study configs/study_1b.py --plan h100:8
    python -m oasis_jax study configs/study_1b.py --plan v5e:4x4

Ten billion tokens a run, of which those corpora have about three: sinks ask for a billion distinct ones
(arXiv 2410.10781). Softmax comes first (--methods residual); the others are worth their time where it has formed a
sink.

Hardware: 8 GPUs of 40 GB, or 16 chips of a TPU v5e. The plans say (2026-11-28, jax 0.12), on each device: h100:8
residual 5.5 GiB, oasis 7.5, oasis_blocks 6.9, their evaluations at most 7.4; v5e:4x4 oasis 6.7 of 16, its evaluation
5.2. The other methods were not planned.
Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.study import Claim, Outcome, Study, claims

SINK, EIGHT_BITS = "sink_rate", "quantized.w8a8_tensor.nats"
FORMED = {SINK: 0.03}


def get_study() -> Study:
    base = Config(
        model=ModelConfig(
            preset="residual",
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            mlp_dim=7168,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="prepared",
            pattern="data/bookcorpus_wiki40b",
            tokenizer="bpe",
            bpe_vocab_size=32768,
            sequence_length=1024,
            batch_size=512,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000, accumulation_steps=4),
        mesh=MeshConfig(fsdp=8),
        run=RunConfig(steps=20000, log_interval=10, telemetry_interval=500, checkpoint_interval=1000),
    )
    return Study(
        title="OASIS' claims at a billion parameters",
        base=base,
        methods={
            "residual": (),
            "residual_softmax1": ("model.normalizer=softmax1",),
            "attnres": ("model.preset=attnres",),
            "attnres_cumulative": ("model.preset=attnres_cumulative",),
            "softmax1": ("model.preset=softmax1",),
            "oasis": ("model.preset=oasis",),
            "oasis_uncoupled": ("model.preset=oasis", "model.coupling=false"),
            "oasis_blocks": ("model.preset=oasis_blocks", "model.blocks=8"),
        },
        twins={
            **dict.fromkeys(("softmax1", "oasis"), "attnres_cumulative"),
            "oasis_uncoupled": "oasis",
            "oasis_blocks": "attnres",
        },
        seeds=(0, 1, 2),
        measures=("default", "values", "massive", "residual_sinks"),
        interventions=("beta",),
        schemes=("w8a8_tensor", "w8a8_tensor+sink_float", "w8a8", "w4a4_g32"),
        eval_batches=2,
        outcomes=(
            Outcome("perplexity", "perplexity"),
            Outcome(SINK, "sink rate", relative=False),
            Outcome("first_token_mass", "first-token mass", relative=False),
            Outcome("null_mass", "null mass", "none", relative=False),
            Outcome("max_inf_norm", "max inf norm"),
            Outcome("avg_kurtosis", "mean kurtosis"),
            Outcome(EIGHT_BITS, "w8a8_tensor, nats", relative=False),
            Outcome("quantized.w8a8_tensor.d_sink", "D_sink, nats", relative=False),
            Outcome("quantized.w4a4_g32.nats", "w4a4_g32, nats", relative=False),
        ),
        claims=(
            *claims.of_oasis(sink=SINK, eight_bits=EIGHT_BITS, formed=FORMED, uncoupled="oasis_uncoupled"),
            *claims.of_depth({"sinks": SINK, "8 bits": EIGHT_BITS}),
            Claim("Softmax1 weakens sinks", "2410.10781", SINK, "residual_softmax1", "residual", needs=FORMED),
        ),
    )
