"""Does a sink form, and what takes it away: pretraining of 27M parameters on 600M distinct tokens, one GPU.

Learned positions, weight decay .5, a high learning rate and a begin token in every row favour sinks (arXiv 2410.10781).
Softmax comes first; the other methods are worth their time only where it has formed a sink:

    python -m oasis_jax prepare --source hf:HuggingFaceFW/fineweb-edu/sample-10BT --tokenizer bpe \
        --set data.bpe_vocab_size=32768 --set data.holdout_fraction=0.005 --out data/fineweb_edu
    python -m oasis_jax study configs/study_pretrain.py --out runs/study_pretrain --methods residual --minutes 10
    python -m oasis_jax study configs/study_pretrain.py --out runs/study_pretrain --minutes 10
    python -m oasis_jax study configs/study_pretrain.py --plan h100:1

Hardware: one GPU, in pieces of ten minutes. The plan says (2026-11-28, jax 0.12): 5.4 of
72.8 GiB for oasis, 1.65 for its evaluation.
Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.study import Claim, Outcome, Study, claims

SINK, EIGHT_BITS = "sink_rate", "quantized.w8a8_tensor.nats"
FORMED = {SINK: 0.03}


def get_study() -> Study:
    base = Config(
        model=ModelConfig(
            preset="residual",
            num_layers=8,
            width=384,
            num_heads=6,
            rope_theta=0.0,
            learned_positions=512,
            dtype="bfloat16",
        ),
        data=DataConfig(
            corpus="prepared",
            pattern="data/fineweb_edu",
            tokenizer="bpe",
            bpe_vocab_size=32768,
            sequence_length=512,
            batch_size=256,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=200, weight_decay=0.5),
        run=RunConfig(steps=4600, log_interval=20, telemetry_interval=200, checkpoint_interval=500),
    )
    return Study(
        title="Pretraining where sinks form",
        base=base,
        methods={
            "residual": (),
            "residual_softmax1": ("model.normalizer=softmax1",),
            "attnres": ("model.preset=attnres",),
            "attnres_cumulative": ("model.preset=attnres_cumulative",),
            "softmax1": ("model.preset=softmax1",),
            "oasis": ("model.preset=oasis",),
            "oasis_blocks": ("model.preset=oasis_blocks", "model.blocks=4"),
        },
        twins={"softmax1": "attnres_cumulative", "oasis": "attnres_cumulative", "oasis_blocks": "attnres"},
        seeds=(0, 1, 2),
        measures=("default", "values", "massive", "residual_sinks"),
        interventions=("beta",),
        schemes=("w8a8_tensor", "w8a8_tensor+sink_float", "w8a8", "w4a4_g32"),
        eval_batches=4,
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
            *claims.of_oasis(sink=SINK, eight_bits=EIGHT_BITS, formed=FORMED),
            *claims.of_depth({"sinks": SINK, "8 bits": EIGHT_BITS}),
            Claim("Softmax1 weakens sinks", "2410.10781", SINK, "residual_softmax1", "residual", needs=FORMED),
        ),
    )
