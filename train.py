"""Trains the model of a config: python train.py --config=configs/demo.py --workdir=runs/oasis. See --help."""

from oasis_jax.commands.parser import run_main
from oasis_jax.commands.train import main

if __name__ == "__main__":
    run_main(main)
