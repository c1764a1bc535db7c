"""OPT-125M's architecture from scratch, with another attention: one of the paper's backbones (arXiv 2605.17887; OPT:
2205.01068).

    python train.py --config=configs/opt_125m.py --workdir=runs/opt --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/opt_125m.py --plan=h100:1

Its twin with softmax and no routing: `--set model.preset=residual`.

Learned positions and strong weight decay are the settings in which sinks form soonest (arXiv 2410.10781).

Hardware: one GPU. Not trained here: there are no metrics of it.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            num_layers=12,
            width=768,
            num_heads=12,
            mlp_dim=3072,
            mlp_activation="relu",
            mlp_gated=False,
            mlp_bias=True,
            qkv_bias=True,
            output_bias=True,
            norm="layernorm",
            norm_epsilon=1e-5,
            rope_theta=0.0,
            learned_positions=2050,
            position_offset=2,
            dtype="bfloat16",
            remat="dots",
        ),
        data=DataConfig(
            corpus="files",
            pattern="data/*.jsonl",
            tokenizer="bpe",
            bpe_vocab_size=50272,
            sequence_length=512,
            batch_size=192,
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-4, warmup_steps=2000, schedule="linear", final_fraction=0.0, weight_decay=0.1
        ),
        run=RunConfig(steps=125000, log_interval=10, eval_interval=1000, checkpoint_interval=1000),
    )
