"""What measuring costs beside a plain perplexity pass, on the same model: one compiled pass over a batch, and
a whole evaluation.

python benchmarks/measures.py [--length 2048] [--batch 2] [--batches 4] [--repetitions 7] [--preset oasis]
"""

import argparse
import dataclasses
import functools
import pathlib

import _harness as harness
import jax
import numpy as np

from oasis_jax.commands.config_file import load_config
from oasis_jax.evaluation import EVALUATORS, choose, evaluate
from oasis_jax.evaluation.passes import DecoderPass, lower
from oasis_jax.model.decoder import initial_params
from oasis_jax.placement import UNSHARDED

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"
VOCAB = 258  # bytes


def make_batches(count: int, batch: int, length: int) -> list[dict]:
    random = np.random.default_rng(0)
    shape, ones = (batch, length), np.ones((batch, length), np.float32)
    tokens = [random.integers(VOCAB, size=(2, *shape), dtype=np.int32) for _ in range(count)]
    return [{"inputs": inputs, "targets": targets, "weights": ones} for inputs, targets in tokens]


def evaluation(params, config, batches, evaluators):
    """All batches, the averages and the confidence intervals."""
    found = evaluate(params, config, UNSHARDED, batches, evaluators)
    return found.values, found.intervals()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--preset", default="oasis")
    arguments = parser.parse_args()
    config = dataclasses.replace(load_config(DEMO).model.with_preset(arguments.preset), vocab_size=VOCAB)
    params = jax.jit(lambda: initial_params(config, jax.random.key(0)))()
    batches = make_batches(arguments.batches, arguments.batch, arguments.length)
    plain = choose(["perplexity"])
    sets = {"perplexity alone": plain, "default set": choose(["default"]), "full set": EVALUATORS}
    sets |= {f"perplexity and {name}": plain | {name: EVALUATORS[name]} for name in EVALUATORS if name != "perplexity"}
    compiled, passes = {}, {}
    for name, evaluators in sets.items():
        compiled[name] = lower(DecoderPass(config), params, batches[0], evaluators).compile()
        passes[name] = functools.partial(compiled[name], params, None, batches[0], arguments.batch)
    results = harness.interleave(passes, repetitions=arguments.repetitions)
    for name, run in compiled.items():
        results[name]["temporary_mib"] = run.memory_analysis().temp_size_in_bytes / 2**20
    whole = {
        name: functools.partial(evaluation, params, config, batches, sets[name])
        for name in ("perplexity alone", "default set", "full set")
    }
    evaluations = harness.interleave(whole, repetitions=max(2, arguments.repetitions // 3))
    for name in evaluations:
        evaluations[name]["temporary_mib"] = results[name]["temporary_mib"]
    for rows in (results, evaluations):
        for row in rows.values():
            row["cost"] = row["median_ms"] / rows["perplexity alone"]["median_ms"]
    what = (
        f"{config.preset}, {config.num_layers} layers of width {config.width}, {config.num_heads} heads, "
        f"{arguments.batch} x {arguments.length} tokens"
    )
    titles = {
        f"one pass, {what}": results,
        f"a whole evaluation with its intervals, {what} x {arguments.batches}": evaluations,
    }
    for title, rows in titles.items():
        harness.show(title, rows, "perplexity alone")
    harness.save("measures", titles)


if __name__ == "__main__":
    main()
