"""Qwen3-0.6B trained on with OASIS in it, with the data as its paper's scripts lay it out (arXiv 2605.17887): 25,000
steps, 2,000 of them warm-up, of 6 x 16 blocks of 512 tokens. On which text is not stated for this backbone; here it
is WikiText-103.

    python -m oasis_jax prepare --source hf:wikitext/wikitext-103-raw-v1 \
        --tokenizer DIR --out prepared/wikitext-103-qwen3
    python train.py --config=configs/paper_qwen3.py --workdir=runs/paper_qwen3 --set run.init_from=DIR
    python train.py --config=configs/paper_qwen3.py --plan=h100:1

Texts are grouped as the published scripts group them: special tokens for every text (a row of the data set), 1,000
texts joined and cut into blocks of 512, the rest left out. Unlike there, a row that repeats another counts once, and 5
% of the text is held out. Qwen3 has no begin token. DIR is a folder with the model's safetensors, config.json and
tokenizer.json.

The model, the optimizer and the steps are those of configs/finetune_qwen3.py, and so is the plan.

Hardware: one GPU of 24 GB or more; planned: 12.3 GiB (h100:1, jax 0.12, 2026-11-28). At the chip's peak the steps take
1.4 hours, in practice more. Not trained here: neither times nor metrics.
"""

import dataclasses
import pathlib

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import Config


def get_config() -> Config:
    base = load_config(pathlib.Path(__file__).with_name("finetune_qwen3.py"))
    data = dataclasses.replace(
        base.data, corpus="prepared", pattern="prepared/wikitext-103-qwen3", tokenizer="library", packing="group_texts"
    )
    return dataclasses.replace(base, data=data)
