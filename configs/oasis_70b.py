"""OASIS with 70 billion parameters: routing over eight blocks of sublayers, which keeps memory near the plain
transformer's.

    python train.py --config=configs/oasis_70b.py --workdir=runs/70b --set 'data.pattern=/data/*.jsonl' --distributed
    python train.py --config=configs/oasis_70b.py --plan=v5p:8x8x8

Hardware: 512 chips of a TPU v5p. The plan says (2026-11-24, jax 0.12): 32.9 of 95 GiB on each chip.
Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis_blocks",
            num_layers=80,
            width=8192,
            num_heads=64,
            num_kv_heads=8,
            mlp_dim=28672,
            tied_head=False,
            rope_theta=500000.0,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=131072,
            sequence_length=8192,
            batch_size=512,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=128, tensor=4),
        run=RunConfig(steps=250000, log_interval=10, eval_interval=1000, checkpoint_interval=1000, keep_every=10000),
    )
