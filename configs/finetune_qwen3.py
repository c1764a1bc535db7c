"""Qwen3-0.6B trained on with OASIS in it, as its paper's scripts do it (arXiv 2605.17887): 25,000 steps, 2,000 of them
warm-up, of 96 sequences of 512 tokens.

    python train.py --config=configs/finetune_qwen3.py --workdir=runs/qwen3 \
        --set run.init_from=DIR --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/finetune_qwen3.py --plan=h100:1

DIR holds the model's safetensors, config.json and tokenizer.json. The sizes below are its own, so that a plan needs no
file; what else it is comes from its config.json. OASIS' own wiring begins far from the model that it is put into;
`--set model.preset=attnres` begins as the model itself. The paper's recipe ran one GPU in float16.

Hardware: one GPU of 24 GB or more; planned (h100:1, jax 0.12, 2026-11-27): 12.3 GiB. Not trained here: neither times
nor metrics.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            recency_bias_init=8.0,
            router_init_std=0.02 / 256**0.5,
            num_layers=28,
            width=1024,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=3072,
            qk_norm=True,
            vocab_size=151936,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files", pattern="data/*.jsonl", tokenizer="library", sequence_length=512, batch_size=6 * 16
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-4, warmup_steps=2000, schedule="linear", final_fraction=0.0, accumulation_steps=16
        ),
        run=RunConfig(
            steps=25_000,
            init_from="Qwen/Qwen3-0.6B",
            log_interval=10,
            eval_interval=5000,
            checkpoint_interval=5000,
        ),
    )
