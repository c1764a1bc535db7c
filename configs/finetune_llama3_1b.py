"""Llama-3.2-1B trained on with OASIS in it, as its paper's scripts do it (arXiv 2605.17887): 2,000 steps, all of them
warm-up, of 192 sequences of 512 tokens.

    python train.py --config=configs/finetune_llama3_1b.py --workdir=runs/llama \
        --set run.init_from=DIR --set 'data.pattern=/data/*.jsonl'
    python train.py --config=configs/finetune_llama3_1b.py --plan=h100:1

DIR holds the model's safetensors, config.json and tokenizer.json. The sizes below are its own, so that a plan needs no
file; what else it is comes from its config.json. OASIS' own wiring begins far from the model that it is put into;
`--set model.preset=attnres` begins as the model itself. The paper's recipe ran one GPU in float16.

Hardware: one GPU of 40 GB or more; planned (h100:1, jax 0.12, 2026-11-27): 25.3 GiB. Not trained here: neither times
nor metrics.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis",
            router_init_std=0.02 / 512**0.5,
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            mlp_dim=8192,
            vocab_size=128256,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files", pattern="data/*.jsonl", tokenizer="library", sequence_length=512, batch_size=6 * 32
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000, schedule="linear", accumulation_steps=32),
        run=RunConfig(
            steps=2000,
            init_from="meta-llama/Llama-3.2-1B",
            log_interval=10,
            eval_interval=500,
            checkpoint_interval=500,
        ),
    )
