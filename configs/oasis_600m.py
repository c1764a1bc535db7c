"""OASIS with 0.6 billion parameters: the published wiring, every layer's stream a source, queries projected
from each token.

    python train.py --config=configs/oasis_600m.py --workdir=runs/oasis_600m --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/oasis_600m.py --plan=h100:8

Hardware: one box of 8 GPUs. The plan says (2026-11-24, jax 0.12): 9.0 of 72.8 GiB on each GPU.
Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            num_layers=28,
            width=1280,
            num_heads=20,
            num_kv_heads=5,
            mlp_dim=4096,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=32768,
            sequence_length=4096,
            batch_size=64,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        mesh=MeshConfig(fsdp=8),
        run=RunConfig(steps=50000, log_interval=10, eval_interval=1000, checkpoint_interval=1000, keep_every=10000),
    )
