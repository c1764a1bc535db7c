"""Measures trained runs and writes a report: python eval.py --workdir runs/a --workdir runs/b --report runs/report."""

from oasis_jax.commands.eval import main
from oasis_jax.commands.parser import run_main

if __name__ == "__main__":
    run_main(main)
