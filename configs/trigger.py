"""Trigger-conditional averaging (arXiv 2603.11487): a task on which softmax attention has to form a sink.

At a trigger the model has to put out the mean of the content so far, anywhere else zero. Softmax can only put out zero by
sending its mass to a token without content, the first one; Softmax1 can send it to the null.

    python train.py --config=configs/trigger.py --workdir=runs/sink
    python train.py --config=configs/trigger.py --workdir=runs/no_sink --set model.normalizer=softmax1
    python eval.py --workdir runs/sink --workdir runs/no_sink --report runs/sinks

Hardware: two CPU cores, no download. Time and metrics (first_token_mass, null_mass): see README, "Results".
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual", inputs="vectors", num_layers=2, width=64, num_heads=1),
        data=DataConfig(corpus="trigger", sequence_length=64, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        run=RunConfig(steps=3000, log_interval=10, telemetry_interval=500, checkpoint_interval=1000),
    )
