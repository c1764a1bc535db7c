"""How far every way of putting routers and nulls into a trained model begins from it, before any training.

JAX_PLATFORMS=cpu python benchmarks/retrofit.py [--source FOLDER]
"""

import argparse
import functools
import re
import sys

import jax
from _harness import save

from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.data import load_corpus
from oasis_jax.errors import UserError
from oasis_jax.model.decoder import initial_params
from oasis_jax.placement import make_mesh
from oasis_jax.pretrained import smollm2
from oasis_jax.training.loop import training_examples, with_sizes
from oasis_jax.training.state import abstract_state, shardings_of
from oasis_jax.training.warm_start import starting_parameters, starting_point, with_source

REFERENCE = dict(preset="oasis", recency_bias_init=8.0)
# Name -> fields of model, run and optimizer.
STARTS = {
    "as it is": (dict(preset="residual"), {}, {}),
    "attnres": (dict(preset="attnres"), {}, {}),
    "attnres, 8 blocks": (dict(preset="attnres", blocks=8), {}, {}),
    "attnres, 8 blocks, sum-preserving": (dict(preset="attnres", blocks=8, sum_preserving=True), {}, {}),
    "cumulative, alpha gate": (dict(preset="attnres_cumulative", alpha_gate=True), {}, {}),
    "cumulative, bias 0": (dict(preset="attnres_cumulative"), {}, {}),
    "oasis by the reference's retrofit": (REFERENCE, {}, {}),
    "softmax1 at once": (dict(preset="residual", normalizer="softmax1"), {}, {}),
    "softmax1 by a ramp": (dict(preset="residual", normalizer="softmax1"), {}, dict(null_ramp_steps=10)),
    "a null of one per cent": (
        dict(preset="residual", normalizer="learned_sink"), dict(init_null="one_per_cent"), {}
    ),
    "the begin token as null": (
        dict(preset="residual", normalizer="null_key_value"), dict(init_null="transplant"), {}
    ),
    "oasis_blocks": (dict(preset="oasis_blocks"), {}, {}),
    "oasis_blocks, the begin token as null": (
        dict(preset="oasis_blocks", normalizer="null_key_value"), dict(init_null="transplant"), {}
    ),
}  # fmt: skip


def distance(source: str, model: dict, run: dict, optimizer: dict) -> dict[str, float]:
    """What a run says of its start."""
    data = DataConfig(tokenizer="library", sequence_length=256, batch_size=4)
    if run.get("init_null") == "transplant":
        data = DataConfig(tokenizer="library", sequence_length=256, batch_size=4, begin_token=False)
    config = Config(
        model=ModelConfig(**model),
        data=data,
        optimizer=OptimizerConfig(**optimizer),
        run=RunConfig(init_from=source, **run),
    )
    if model is REFERENCE:
        width = with_source(config).model.width
        return distance(source, REFERENCE | dict(router_init_std=0.02 / max(width // 4, 64) ** 0.5), run, optimizer)
    config, said = with_source(config), []
    with starting_point(config, said.append) as start:
        corpus = load_corpus(config.data, seed=0, tokenizer=start.tokenizer)
        config = with_sizes(config, corpus)
        shardings = shardings_of(abstract_state(config, make_mesh(config.mesh)).params)
        initial = jax.jit(functools.partial(initial_params, config.model), out_shardings=shardings)(jax.random.key(0))
        examples = functools.partial(training_examples, corpus, config)
        starting_parameters(start, config, initial, examples, said.append)
    found = re.search(r"by (\S+) of the largest, loss (\S+) against (\S+) ", said[-1])
    return dict(zip(("logits", "loss", "source_loss"), map(float, found.groups())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a folder of safetensors or a .gguf file; SmolLM2-135M where it is not given")
    source = parser.parse_args().source
    try:
        source = source or str(smollm2.fetch())
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)
        return
    results = {}
    for name, fields in STARTS.items():
        results[name] = found = distance(source, *fields)
        nats = found["loss"] - found["source_loss"]
        print(f"{name:38} logits {found['logits']:.1e}, loss {found['loss']:.4f}, {nats:+.4f} nats", flush=True)
    save("retrofit", results)


if __name__ == "__main__":
    main()
