"""Phi-4-mini trained on with OASIS in it, as its paper's scripts do it on WikiText-2 (arXiv 2605.17887): 2,000 steps,
200 of them warm-up, of 32 sequences of 512 tokens.

    python train.py --config=configs/finetune_phi4_mini.py --workdir=runs/phi4 \
        --set run.init_from=DIR --set 'data.pattern=/data/wikitext-2/*.txt'
    python train.py --config=configs/finetune_phi4_mini.py --plan=h200:1

DIR holds the model's safetensors, config.json and tokenizer.json. The sizes below are its own, so that a plan needs no
file; what else it is comes from its config.json. OASIS' own wiring begins far from the model that it is put into;
`--set model.preset=attnres` begins as the model itself.

Hardware: one GPU of 141 GB; planned (h200:1, jax 0.12, 2026-11-27): 78.4 GiB. Not trained here: neither times nor
metrics.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            recency_bias_init=8.0,
            router_init_std=0.02 / 768**0.5,
            num_layers=32,
            width=3072,
            num_heads=24,
            num_kv_heads=8,
            mlp_dim=8192,
            rope_fraction=0.75,
            vocab_size=200064,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files", pattern="data/*.txt", tokenizer="library", sequence_length=512, batch_size=2 * 16
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_steps=200, schedule="linear", final_fraction=0.0, accumulation_steps=16
        ),
        run=RunConfig(
            steps=2000,
            init_from="microsoft/Phi-4-mini-instruct",
            log_interval=10,
            eval_interval=500,
            checkpoint_interval=500,
        ),
    )
