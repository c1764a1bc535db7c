"""OASIS with 8 billion parameters: routing over eight blocks of sublayers, which keeps memory near the plain
transformer's.

    python train.py --config=configs/oasis_8b.py --workdir=runs/8b --set 'data.pattern=/data/*.jsonl' --distributed
    python train.py --config=configs/oasis_8b.py --plan=v5p:4x4x4

Hardware: 64 chips of a TPU v5p. The plan says (2026-11-27, jax 0.12): 41.1 of 95 GiB on each chip,
7.3 for an evaluation.
Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis_blocks",
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=8,
            mlp_dim=14336,
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
            batch_size=256,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=64),
        run=RunConfig(steps=100000, log_interval=10, eval_interval=1000, checkpoint_interval=1000, keep_every=10000),
    )
