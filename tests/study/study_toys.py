"""A study small enough to run in seconds, and records as cells would write them."""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.study import Claim, Outcome, Study

BASE = Config(
    model=ModelConfig(preset="residual", inputs="vectors", num_layers=1, width=8, num_heads=1, mlp_dim=8),
    data=DataConfig(corpus="trigger", sequence_length=9, batch_size=4, trigger_dim=3),
    optimizer=OptimizerConfig(warmup_steps=1),
    run=RunConfig(steps=6, telemetry_interval=0, checkpoint_interval=2),
)
ERROR = Outcome("squared_error", "squared error")


def toy_study(**fields) -> Study:
    given = dict(
        title="A toy",
        base=BASE,
        methods={"softmax": (), "softmax1": ("model.normalizer=softmax1",)},
        seeds=(0, 1),
        measures=("perplexity",),
        eval_batches=1,
        outcomes=(ERROR,),
        claims=(Claim("It errs less", "nobody", ERROR.value, "softmax1", "softmax"),),
    )
    return Study(**given | fields)


def record(method: str, seed: int, arm: str = "all", destroyed=(), failed=None, **values) -> dict:
    """What a cell has written down, of a start that all share."""
    start = {"parameters": {"embedding": [3, 5, 77]}, "settings": {"run": {"steps": 6}, "data": {"batch_size": 4}}}
    return dict(
        arm=arm,
        method=method,
        seed=seed,
        values=values,
        destroyed=list(destroyed),
        failed=failed,
        start=start,
        corpus="c0ffee",
        versions={"python": "3"},
    )
