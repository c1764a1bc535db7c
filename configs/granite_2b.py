"""A dense model of 2 billion parameters whose layers differ, after Granite: three with a window and rotary
positions, then one over everything and without positions; learned sinks, and multipliers on embedding,
scores, sublayers and logits.

    python train.py --config=configs/granite_2b.py --workdir=runs/granite --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/granite_2b.py --plan=h100:8
    python -m oasis_jax show configs/granite_2b.py

With its sinks replaced: `--set model.preset=residual` or, routed over blocks, `--set model.preset=oasis_blocks`.

Hardware: one box of 8 GPUs. Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, LayerPattern, MeshConfig, ModelConfig, OptimizerConfig, RunConfig

WINDOWED, FULL = LayerPattern(window=128, rope_theta=10_000.0), LayerPattern(window=0, rope_theta=0.0)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="residual",
            normalizer="learned_sink",
            num_layers=24,
            width=2560,
            num_heads=20,
            num_kv_heads=4,
            head_dim=128,
            mlp_dim=8192,
            layer_pattern=(FULL, WINDOWED, WINDOWED, WINDOWED),
            attention_scale=1 / 128,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            logits_multiplier=1 / 8,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=100352,
            sequence_length=4096,
            batch_size=64,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000),
        mesh=MeshConfig(fsdp=8),
        run=RunConfig(steps=50000, log_interval=10, eval_interval=1000, checkpoint_interval=1000),
    )
