"""A pretrained model trained on with your own text; sizes and tokenizer are the model's.

    python train.py --config=configs/finetune.py --workdir=runs/on --set run.init_from=DIR --set 'data.pattern=b/*.txt'
    python eval.py --workdir runs/on --report runs/on_report

DIR holds safetensors, config.json and tokenizer.json; a .gguf file does, too: `python -m
oasis_jax.pretrained.smollm2` fetches one to try. `--set model.preset=attnres` adds depth routers that start as the
model itself (docs/pretrained.md).

Hardware: as the model asks for. Metrics: those of your text.
"""

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(preset="residual"),
        data=DataConfig(corpus="files", pattern="*.txt", tokenizer="library", sequence_length=256, batch_size=2),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20, weight_decay=0.0, router_multiplier=50.0),
        run=RunConfig(steps=200, eval_interval=100),
    )
