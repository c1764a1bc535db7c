"""Bigram-Backcopy (arXiv 2410.13835): the smallest task of tokens on which softmax attention forms sinks.

Characters follow each other as in a text (Python's standard library; data.pattern for another), but after one of the
three most frequent ones the next is a copy of the character before it. The heads that copy have nothing to do behind
any other character, and softmax lets them rest on the begin token, whose value shrinks. A plain architecture: with
rotary positions, RMSNorm and SwiGLU (width 128, 1,094 steps) the task was learned without any sink.

    python train.py --config=configs/backcopy.py --workdir=runs/softmax
    python train.py --config=configs/backcopy.py --workdir=runs/softmax1 --set model.normalizer=softmax1
    python train.py --config=configs/backcopy.py --workdir=runs/sgd --set optimizer.optimizer=sgd
    python eval.py --workdir runs/softmax --workdir runs/softmax1 --report runs/sinks --measures=all

Hardware: two CPU cores, no download, about five minutes a run. Metrics of the first after 2,787 steps (seed 0,
2026-11-28): sink_rate 0.65, non_trigger_first_token_mass_max 0.63, value_drain 0.29, residual_peak 1.0 (none yet),
trigger_excess_risk 0.003 and non_trigger_excess_risk 0.027 nats.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

LENGTH = 64


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="residual", num_layers=3, width=64, num_heads=1, norm="layernorm", rope_theta=0.0,
            learned_positions=LENGTH, mlp_gated=False, mlp_activation="relu", tied_head=False,
        ),
        data=DataConfig(corpus="backcopy", sequence_length=LENGTH, batch_size=32),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=20, schedule="constant", weight_decay=1e-4, beta2=0.99
        ),
        run=RunConfig(steps=2800, log_interval=10, telemetry_interval=100, checkpoint_interval=500),
    )  # fmt: skip
