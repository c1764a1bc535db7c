"""OASIS on Python's standard library, byte by byte: the model of `make demo`, small enough for a laptop.

    python train.py --config=configs/demo.py --workdir=runs/oasis
    python train.py --config=configs/demo.py --workdir=runs/twin --set model.preset=attnres_cumulative
    python eval.py --workdir runs/oasis --workdir runs/twin --report runs/report

The second line trains its twin: the same wiring, data, seed and steps with softmax over tokens and over depth.
Any other method of `train.py --help` is trained the same way.

Hardware: two CPU cores, no download. Time and metrics: see docs/demo.md.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="oasis", num_layers=4, width=128, num_heads=4),
        data=DataConfig(corpus="stdlib", tokenizer="bytes", sequence_length=512, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        run=RunConfig(steps=150, eval_interval=50),
    )
