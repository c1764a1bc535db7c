"""Your own text: every .txt or .jsonl file of a glob, with a byte-level BPE learned from it and saved with the run.

    python train.py --config=configs/files.py --workdir=runs/mine --set "data.pattern=books/*.txt"
    python eval.py --workdir runs/mine --report runs/mine_report

A twentieth of the text is held out, by document. Of a .jsonl line the key `data.text_key` is read.
The method is OASIS on AttnRes blocks in bfloat16; `--set model.preset=NAME` trains another.

Hardware: made for one accelerator; on CPUs take fewer layers and `--set model.dtype=float32`. Metrics: those of your
text.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            preset="oasis_blocks",
            num_layers=12,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            dtype="bfloat16",
            remat="layer",
        ),
        data=DataConfig(
            corpus="files",
            pattern="texts/*.txt",
            tokenizer="bpe",
            bpe_vocab_size=8192,
            sequence_length=512,
            batch_size=32,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
        run=RunConfig(steps=5000, log_interval=10, telemetry_interval=200, eval_interval=500, checkpoint_interval=500),
    )
