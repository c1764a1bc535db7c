"""Llama-3.2-1B trained on with OASIS in it, with the data as its paper's scripts lay it out (arXiv 2605.17887): 2,000
steps, all of them warm-up, of 6 x 32 blocks of 512 tokens. On which text is not stated for this backbone; here it
is WikiText-103.

    python -m oasis_jax prepare --source hf:wikitext/wikitext-103-raw-v1 \
        --tokenizer DIR --out prepared/wikitext-103-llama3
    python train.py --config=configs/paper_llama3_1b.py --workdir=runs/paper_llama3_1b --set run.init_from=DIR
    python train.py --config=configs/paper_llama3_1b.py --plan=h100:1

Texts are grouped as the published scripts group them: special tokens for every text (a row of the data set), 1,000
texts joined and cut into blocks of 512, the rest left out. Unlike there, a row that repeats another counts once, and 5
% of the text is held out. DIR is a folder with the model's safetensors, config.json and tokenizer.json.

The model, the optimizer and the steps are those of configs/finetune_llama3_1b.py, and so is the plan.

Hardware: one GPU of 40 GB or more; planned: 25.3 GiB (h100:1, jax 0.12, 2026-11-28). At the chip's peak the steps take
26 minutes, in practice more. Not trained here: neither times nor metrics.
"""

import dataclasses
import pathlib

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import Config


def get_config() -> Config:
    base = load_config(pathlib.Path(__file__).with_name("finetune_llama3_1b.py"))
    data = dataclasses.replace(
        base.data, corpus="prepared", pattern="prepared/wikitext-103-llama3", tokenizer="library", packing="group_texts"
    )
    return dataclasses.replace(base, data=data)
