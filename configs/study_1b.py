"""OASIS' claims at a billion parameters, on the paper's corpora (BookCorpus and Wikipedia), from scratch: eight GPUs or
a slice of 16 TPU v5e.

    python -m oasis_jax prepare --source hf:bookcorpus --source hf:wiki40b/en --tokenizer bpe \
        --set data.bpe_vocab_size=32768 --set data.holdout_fraction=0.005 --out data/bookcorpus_wiki40b
    python -m oasis_jax study configs/study_1b.py --out runs/study_1b --minutes 600
    python -m oasis_jax study configs/study_1b.py --plan h100:8
    python -m oasis_jax study configs/study_1b.py --plan v5e:4x4

The model of configs/oasis_1b.py, the measures and claims of configs/study_pretrain.py. Ten billion tokens a run, of
which those corpora have about three: sinks ask for a billion distinct ones (arXiv 2410.10781). Softmax comes first
(--methods residual); the others are worth their time where it has formed a sink.

Hardware: 8 GPUs of 40 GB, or 16 chips of a TPU v5e. The plans say (2026-11-28, jax 0.12), on each device: h100:8
residual 5.5 GiB, oasis 7.5, oasis_blocks 6.9, their evaluations at most 7.4; v5e:4x4 oasis 6.7 of 16, its evaluation
5.2. The other methods were not planned.
Not trained here: there are no metrics of it.
"""

import dataclasses
import pathlib

from oasis_jax.commands.config_file import load_config
from oasis_jax.commands.study import load_study
from oasis_jax.config import Config, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.study import Study, claims


def get_study() -> Study:
    here = pathlib.Path(__file__)
    small = load_study(here.with_name("study_pretrain.py"))
    return dataclasses.replace(
        small,
        title="OASIS' claims at a billion parameters",
        base=_base(load_config(here.with_name("oasis_1b.py"))),
        methods={
            **small.methods,
            "oasis_uncoupled": ("model.preset=oasis", "model.coupling=false"),
            "oasis_blocks": ("model.preset=oasis_blocks", "model.blocks=8"),
        },
        twins={**small.twins, "oasis_uncoupled": "oasis"},
        eval_batches=2,
        claims=(*small.claims, claims.of_signal("sink_rate")),
    )


def _base(config: Config) -> Config:
    oasis = config.model
    sizes = {name: getattr(oasis, name) for name in ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_dim")}
    return dataclasses.replace(
        config,
        model=ModelConfig(preset="residual", **sizes, dtype=oasis.dtype, remat=oasis.remat),
        data=dataclasses.replace(
            config.data,
            corpus="prepared",
            pattern="data/bookcorpus_wiki40b",
            sequence_length=1024,
            batch_size=512,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000, accumulation_steps=4),
        run=RunConfig(steps=20000, log_interval=10, telemetry_interval=500, checkpoint_interval=1000),
    )
