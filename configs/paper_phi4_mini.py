"""Phi-4-mini trained on with OASIS in it on WikiText-2, with the data as its paper's scripts lay it out (arXiv
2605.17887): 2,000 steps, 200 of them warm-up, of 2 x 16 blocks of 512 tokens.

    python -m oasis_jax prepare --source hf:wikitext/wikitext-2-raw-v1 \
        --tokenizer DIR --out prepared/wikitext-2-phi4
    python train.py --config=configs/paper_phi4_mini.py --workdir=runs/paper_phi4_mini --set run.init_from=DIR
    python train.py --config=configs/paper_phi4_mini.py --plan=h200:1

Texts are grouped as the published scripts group them: special tokens for every text (a row of the data set), 1,000
texts joined and cut into blocks of 512, the rest left out. Unlike there, a row that repeats another counts once, and 5
% of the text is held out. DIR is a folder with the model's safetensors, config.json and tokenizer.json.

The model, the optimizer and the steps are those of configs/finetune_phi4_mini.py, and so is the plan.

Hardware: one GPU of 141 GB; planned: 78.4 GiB (h200:1, jax 0.12, 2026-11-28). At the chip's peak the steps take 14
minutes, in practice more. Not trained here: neither times nor metrics.
"""

import dataclasses
import pathlib

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import Config


def get_config() -> Config:
    base = load_config(pathlib.Path(__file__).with_name("finetune_phi4_mini.py"))
    data = dataclasses.replace(
        base.data, corpus="prepared", pattern="prepared/wikitext-2-phi4", tokenizer="library", packing="group_texts"
    )
    return dataclasses.replace(base, data=data)
