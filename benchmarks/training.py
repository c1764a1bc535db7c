"""A whole optimizer step of every preset against `residual`, at the size of configs/demo.py or another, on whatever
device JAX finds.

python benchmarks/training.py [--repetitions 15] [--presets oasis,attnres]
python benchmarks/training.py --presets oasis_blocks --set model.num_layers=28 --name training-deep
"""

import argparse
import dataclasses
import functools
import pathlib

import _harness as harness
import jax

from oasis_jax.commands.config_file import load_config
from oasis_jax.config import PRESETS, Config
from oasis_jax.data import eval_batches, load_corpus
from oasis_jax.overrides import apply_overrides
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.state import new_state
from oasis_jax.training.step import make_step

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"


def preset_config(preset: str, changes: list[str]) -> Config:
    """The demo's run with these changes and another method on top of it."""
    config = apply_overrides(load_config(DEMO), changes)
    tokens = load_corpus(config.data, seed=0).tokenizer.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model.with_preset(preset), vocab_size=tokens))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="as in train.py: another size than the demo's",
    )
    parser.add_argument("--name", default="training", help="of the file of results")
    arguments = parser.parse_args()
    presets = list(dict.fromkeys(["residual", *arguments.presets.split(",")]))
    steps, states = {}, {}
    for preset in presets:
        config = preset_config(preset, arguments.set)
        mesh = make_mesh(config.mesh)
        steps[preset], states[preset] = make_step(config, mesh), new_state(config, mesh)
    (batch,) = eval_batches(load_corpus(config.data, seed=0).train, config.data, num_batches=1)
    batch = place(config, mesh).put(batch)

    def advance(preset):
        states[preset], metrics = steps[preset](states[preset], batch)
        return metrics

    results = harness.interleave(
        {preset: functools.partial(advance, preset) for preset in presets}, repetitions=arguments.repetitions
    )
    for preset in presets:
        results[preset]["temporary_mib"] = (
            steps[preset].lower(states[preset], batch).compile().memory_analysis().temp_size_in_bytes / 2**20
        )
        results[preset]["parameters"] = sum(x.size for x in jax.tree.leaves(states[preset].params))
    model, data = config.model, config.data
    title = (
        f"optimizer step, {model.num_layers} layers of width {model.width}, batch {data.batch_size}, "
        f"length {data.sequence_length}, {model.dtype}"
    )
    harness.show(title, results, "residual")
    harness.save(arguments.name, {title: results})


if __name__ == "__main__":
    main()
