"""What a run does beside its steps, at the size of configs/demo.py: the input pipeline alone, and telemetry at its
default interval.

python benchmarks/beside_the_step.py [--repetitions 9] [--batches 256]
"""

import argparse
import pathlib

import _harness as harness

from oasis_jax.commands.config_file import load_config
from oasis_jax.data import eval_batches, load_corpus, train_batches
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.guard import floats
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.state import new_state
from oasis_jax.training.step import make_step, make_telemetry

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument(
        "--batches", type=int, default=256, help="batches that the pipeline makes in one go; a few are read ahead"
    )
    arguments = parser.parse_args()
    config = load_config(DEMO)
    corpus = load_corpus(config.data, seed=0)
    config = with_sizes(config, corpus)
    mesh = make_mesh(config.mesh)
    step, telemetry, state = make_step(config, mesh), make_telemetry(config, mesh), new_state(config, mesh)
    (batch,) = eval_batches(corpus.train, config.data, num_batches=1)
    batch = place(config, mesh).put(batch)

    def train():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    runs = {"step": train, "telemetry": lambda: floats(telemetry(state, batch))}
    try:
        batches = train_batches(corpus.train, config.data, seed=0)
        runs["pipeline"] = lambda: [next(batches) for _ in range(arguments.batches)]
    except ImportError as error:  # of grain, which nothing else here needs
        print(f"pipeline: left out, {error}")
    results = harness.interleave(runs, repetitions=arguments.repetitions)
    tokens = config.data.batch_size * config.data.sequence_length
    rates = {"step": 1e3 * tokens / results["step"]["median_ms"]}
    share = results["telemetry"]["median_ms"] / (config.run.telemetry_interval * results["step"]["median_ms"])
    facts = {
        "tokens_per_second": rates,
        "telemetry_interval": config.run.telemetry_interval,
        "telemetry_share_of_step_time": share,
    }
    print(f"step {results['step']['median_ms']:.1f} ms, {rates['step']:,.0f} tokens/s")
    if "pipeline" in results:
        rates["pipeline"] = 1e3 * tokens * arguments.batches / results["pipeline"]["median_ms"]
        facts["pipeline_over_demo"] = rates["pipeline"] / rates["step"]
        print(
            f"pipeline alone {rates['pipeline']:,.0f} tokens/s: {facts['pipeline_over_demo']:.0f} times what the demo "
            "consumes"
        )
    print(
        f"telemetry {results['telemetry']['median_ms']:.1f} ms every {config.run.telemetry_interval} steps: "
        f"{100 * share:.2f} % of step time"
    )
    harness.save("beside-the-step", {"batches of the demo": results}, **facts)


if __name__ == "__main__":
    main()
