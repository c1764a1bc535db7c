"""Qwen3-0.6B's architecture with OASIS in it: heads wider than width / heads, norms on queries and keys (arXiv
2505.09388).

    python train.py --config=configs/qwen3_600m.py --workdir=runs/qwen3 --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/qwen3_600m.py --plan=h100:8

The paper's recipe for this backbone: 25,000 steps, 2,000 of them warm-up (arXiv 2605.17887).

Hardware: one box of 8 GPUs; planned (h100:8, jax 0.12, 2026-11-28): 4.7 GiB on each, 20 minutes at their peak. Not
trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            num_layers=28,
            width=1024,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=3072,
            qk_norm=True,
            rope_theta=1e6,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=151936,
            sequence_length=512,
            batch_size=192,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000, schedule="linear"),
        mesh=MeshConfig(fsdp=8),
        run=RunConfig(steps=25000, log_interval=10, eval_interval=1000, checkpoint_interval=1000),
    )
