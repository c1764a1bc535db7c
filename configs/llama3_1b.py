"""Llama-3.2-1B's architecture with OASIS in it, by the paper's recipe: 2,000 steps, all of them warm-up (arXiv
2605.17887).

    python train.py --config=configs/llama3_1b.py --workdir=runs/llama --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/llama3_1b.py --plan=h100:8

Hardware: one box of 8 GPUs; planned (h100:8, jax 0.12, 2026-11-28): 6.4 GiB on each, 3.3 minutes at their peak. Not
trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeScaling, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            mlp_dim=8192,
            norm_epsilon=1e-5,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_length=8192),
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=128256,
            sequence_length=512,
            batch_size=192,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000, schedule="linear", accumulation_steps=3),
        mesh=MeshConfig(fsdp=8),
        run=RunConfig(steps=2000, log_interval=10, eval_interval=200, checkpoint_interval=200),
    )
