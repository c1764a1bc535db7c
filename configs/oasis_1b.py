"""OASIS with 1 billion parameters: the published wiring, every layer's stream a source, queries projected from each
token.

    python train.py --config=configs/oasis_1b.py --workdir=runs/1b --set 'data.pattern=/data/*.jsonl' --distributed
    python train.py --config=configs/oasis_1b.py --plan=v5p:2x2x2

Hardware: 8 chips of a TPU v5p. The plan says (2026-11-27, jax 0.12): 32.4 of 95 GiB on each chip.
Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            mlp_dim=7168,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=32768,
            sequence_length=4096,
            batch_size=128,
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000),
        mesh=MeshConfig(fsdp=8),
        run=RunConfig(steps=40000, log_interval=10, eval_interval=1000, checkpoint_interval=1000, keep_every=10000),
    )
