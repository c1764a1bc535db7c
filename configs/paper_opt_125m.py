"""OPT-125M from scratch on BookCorpus and Wikipedia with OASIS in it, with the data as its paper's scripts lay it out
(arXiv 2605.17887): 125,000 steps of 192 blocks of 512 tokens.

    python -m oasis_jax prepare --source hf:bookcorpus --source hf:wiki40b/en \
        --tokenizer DIR --out prepared/bookcorpus-wiki40b-opt
    python train.py --config=configs/paper_opt_125m.py --workdir=runs/paper_opt_125m
    python train.py --config=configs/paper_opt_125m.py --plan=h100:1

Texts are grouped as the published scripts group them: special tokens for every text (a row of the data set), 1,000
texts joined and cut into blocks of 512, the rest left out. Unlike there, a row that repeats another counts once, and 5
% of the text is held out. DIR is a folder with OPT's tokenizer.json, as transformers'
AutoTokenizer.from_pretrained("facebook/opt-125m") saves it. Its twin with softmax and no routing: `--set
model.preset=residual`.

The model, the optimizer and the steps are those of configs/opt_125m.py.

Hardware: one GPU of 16 GB or more; planned (h100:1, jax 0.12, 2026-11-28): 10.1 GiB. At the chip's peak the steps take
2.8 hours, in practice more. Not trained here: neither times nor metrics.
"""

import dataclasses
import pathlib

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import Config


def get_config() -> Config:
    base = load_config(pathlib.Path(__file__).with_name("opt_125m.py"))
    data = dataclasses.replace(
        base.data,
        corpus="prepared",
        pattern="prepared/bookcorpus-wiki40b-opt",
        tokenizer="library",
        packing="group_texts",
    )
    return dataclasses.replace(base, data=data, model=dataclasses.replace(base.model, vocab_size=50272))
