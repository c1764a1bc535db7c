"""SmolLM2-135M-Instruct, a real model that the package index carries, trained on with Python's standard library.

    python train.py --config=configs/continue_smollm2.py --workdir=runs/smollm2 \
        --set run.init_from="$(python -m oasis_jax.pretrained.smollm2)"

Hardware: two CPU cores. Measured on them (2026-11-28, float32, beside other work that left a quarter of them to it):
543 seconds of processor time, the compiler's and two evaluations' included, and 5.4 GiB of memory at the most. On a GPU
`--set data.batch_size=32 --set run.steps=500` is more of a run; not measured.

Metrics: held-out loss 1.769 nats a token after 10 steps and 1.745 after 20 (perplexity 5.87 and 5.73).
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual"),
        data=DataConfig(tokenizer="library", sequence_length=256, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=5, weight_decay=0.0, router_multiplier=50.0),
        run=RunConfig(steps=20, eval_interval=10, eval_batches=2),
    )
