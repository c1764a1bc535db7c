"""Bigram-Backcopy (arXiv 2410.13835): the smallest task of tokens that gives a sink, a value drain and a residual peak.

Characters follow each other as in a text (Python's standard library; data.pattern for another), but after one of the
three most frequent ones the next is a copy of the character before it. The heads that copy have nothing to do behind
any other character, and softmax lets them rest on the begin token, whose value shrinks.

    python train.py --config=configs/backcopy.py --workdir=runs/softmax
    python train.py --config=configs/backcopy.py --workdir=runs/softmax1 --set model.normalizer=softmax1
    python eval.py --workdir runs/softmax --workdir runs/softmax1 --report runs/sinks --measures=all

Hardware: two CPU cores, no download, about a quarter of an hour a run. Metrics: trigger_excess_risk and
non_trigger_excess_risk (nats, 0 is perfect), non_trigger_first_token_mass_max, value_drain, residual_peak.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual", num_layers=3, width=128, num_heads=1),
        data=DataConfig(corpus="backcopy", sequence_length=128, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        run=RunConfig(steps=1500, log_interval=10, telemetry_interval=100, checkpoint_interval=500),
    )
