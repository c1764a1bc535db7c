"""Decodes a folder's model on meshes of eight devices, and prints how far it is from one pass on one device: see
test_eight_devices.py.
"""

import dataclasses
import json
import sys
from functools import partial

import jax
import numpy as np
from model import exact

from oasis_jax import Context, generate
from oasis_jax.config import MeshConfig
from oasis_jax.decoding.steps import prefill, step
from oasis_jax.model.decoder import forward
from oasis_jax.pretrained import load_pretrained, transplant_sink

ROWS, LENGTH, LONGEST = 8, 17, 11


def in_float64(model):
    """The model, computing in float64."""
    params = jax.tree.map(lambda x: x.astype("float64"), model.params)
    return model.replace(config=exact.in_float64(dataclasses.replace(model.config)), params=params)


def decoded(model, ids, lengths) -> np.ndarray:
    """Logits [steps, B, V] behind the prompts and behind every further token."""
    context, rows = Context(placement=model.placement), np.arange(len(ids))
    put = lambda x: model.placement.put({"x": x})["x"]
    start = jax.jit(partial(prefill, config=model.config, size=32, context=context))
    more = jax.jit(partial(step, config=model.config, context=context))
    logits, caches = start(model.params, ids=put(ids[:, :LONGEST]), lengths=put(lengths))
    found = [logits]
    for number in range(LENGTH - LONGEST):
        logits, caches = more(model.params, tokens=put(ids[rows, lengths + number]), caches=caches)
        found.append(logits)
    return np.stack(found)


def main(folder: str, meshes: list[dict], transplant: bool) -> dict:
    load = lambda mesh: load_pretrained(folder, mesh=mesh and MeshConfig(**mesh))
    change = (lambda model: transplant_sink(model, [3, 5])) if transplant else lambda model: model
    alone = change(load(None))
    wide = in_float64(alone)
    random = np.random.default_rng(0)
    ids = random.integers(0, alone.config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    lengths = random.integers(1, LONGEST + 1, ROWS).astype(np.int32)
    whole = np.asarray(jax.jit(lambda params, ids: forward(params, wide.config, ids)[0])(wide.params, ids))
    wanted = np.stack([whole[np.arange(ROWS), lengths + n - 1] for n in range(LENGTH - LONGEST + 1)])
    prompts = [row[:n].tolist() for row, n in zip(ids[:5], lengths)]
    texts, found = [row.tokens for row in generate(alone, prompts, max_new_tokens=6)], {}
    for mesh in meshes:
        error = np.abs(decoded(in_float64(change(load(mesh))), ids, lengths) - wanted).max() / np.abs(wanted).max()
        same = [row.tokens for row in generate(change(load(mesh)), prompts, max_new_tokens=6)] == texts
        found[str(mesh)] = {"error": float(error), "same": same}
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "transplant")))
