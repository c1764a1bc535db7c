"""Trigger-conditional averaging (arXiv 2603.11487): a task on which softmax attention forms a sink.

At a trigger the model has to put out the mean of the content so far, anywhere else zero. Softmax attention puts out
zero by sending its mass to a token without content, the begin token. Softmax1 could send it to the null instead; with a
begin token at hand it does not (docs/demo.md).

    python train.py --config=configs/trigger.py --workdir=runs/softmax
    python train.py --config=configs/trigger.py --workdir=runs/softmax1 --set model.normalizer=softmax1
    python eval.py --workdir runs/softmax --workdir runs/softmax1 --report runs/sinks

Hardware: two CPU cores, no download. Time and metrics (first_token_mass, null_mass): see docs/demo.md.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual", inputs="vectors", num_layers=2, width=64, num_heads=1),
        data=DataConfig(corpus="trigger", sequence_length=32, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        run=RunConfig(steps=1000, log_interval=10, telemetry_interval=100, checkpoint_interval=500),
    )
