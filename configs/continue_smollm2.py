"""SmolLM2-135M-Instruct, a real model that the package index carries, trained on with Python's standard library.

    python train.py --config=configs/continue_smollm2.py --workdir=runs/smollm2 \
        --set run.init_from="$(python -m oasis_jax.pretrained.smollm2)"

Hardware: two CPU cores. Measured on them (2026-11-27, float32, four steps and one evaluation, other work beside it):
178 seconds of processor time, of which a step takes some 21, and 5.4 GiB at the most; so these 20 steps are some nine
minutes of processor time, the compiler's included. On a GPU `--set data.batch_size=32 --set run.steps=500` is more of a
run; not measured.

Metrics: the first four losses 2.38, 2.50, 2.12, 2.16 nats a token; held out after them 1.85 (perplexity 6.38).
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual"),
        data=DataConfig(tokenizer="library", sequence_length=256, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=5, weight_decay=0.0, router_multiplier=50.0),
        run=RunConfig(steps=20, eval_interval=10, eval_batches=2),
    )
