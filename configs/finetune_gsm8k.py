"""A pretrained model trained on GSM8K's questions and answers, with the loss on the answers alone; then its score.

    python train.py --config=configs/finetune_gsm8k.py --workdir=runs/gsm8k \
        --set run.init_from=DIR --set data.pattern=gsm8k/train.jsonl
    python eval.py --workdir=runs/gsm8k --report=runs/gsm8k_report --tasks=gsm8k --gsm8k-file=gsm8k/test.jsonl \
        --quantize=w8a8,w4a4_g32

DIR holds safetensors, config.json and tokenizer.json; a .gguf file does, too. Lines are {"question": .., "answer": ..};
whole pairs are packed into rows and do not see each other. A twentieth of the questions is held out.
`--set model.preset=attnres` adds depth routers that start as the model itself (docs/pretrained.md).

Hardware: as the model asks for; SmolLM2-135M trains on two CPU cores. Metrics: held-out loss of the answers; not
trained to the end here, so neither times nor a score.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual"),
        data=DataConfig(
            corpus="pairs", pattern="gsm8k/train.jsonl", tokenizer="library", sequence_length=1024, batch_size=8
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=30, weight_decay=0.0, router_multiplier=50.0),
        run=RunConfig(steps=600, log_interval=10, eval_interval=100, checkpoint_interval=100),
    )
