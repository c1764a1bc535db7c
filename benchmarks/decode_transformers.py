"""Decoding SmolLM2-135M and a random model of 20M parameters: this library against transformers, in float32, on the
same cores and the same weights, taking turns; then a token's time behind 4k cached ones beside a plain read of weights
and cache, and what keys and values in 8 bits cost.

python benchmarks/decode_transformers.py [--part transformers|read|int8] [--repetitions 3]     needs torch and
transformers for the first part
"""

import argparse
import functools
import importlib
import os
import pathlib
import tempfile
import time

import _harness as harness
import jax
import jax.numpy as jnp
import numpy as np

from oasis_jax.decoding.generate import generate
from oasis_jax.decoding.steps import for_steps, prefill, step
from oasis_jax.model.cache import STORAGES, KVCache
from oasis_jax.model.context import Context
from oasis_jax.pretrained import Pretrained, load_pretrained, save_pretrained
from oasis_jax.pretrained.smollm2 import fetch

PROMPT, NEW, LONG, CACHED = 32, 64, 512, 4096
AIMS = {"greedy, batch 1": 1.5, "greedy, batch 16": 3.0, "prefill of 512": 1.5}
SMALL = {
    "model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4224, "tie_word_embeddings": True, "vocab_size": 16384,
}  # fmt: skip


def random_small(folder: pathlib.Path) -> Pretrained:
    """20M parameters, drawn, as a Llama: both libraries read it from the folder."""
    from oasis_jax.model.decoder import initial_params
    from oasis_jax.pretrained.families import read_model_config

    config = read_model_config(SMALL, "small")
    params = jax.jit(initial_params, static_argnums=0)(config, jax.random.key(0))
    save_pretrained(Pretrained(config, params, source_config=SMALL), folder, dtype="float32")
    return load_pretrained(folder)


def theirs(model: Pretrained, folder: pathlib.Path):
    """The same weights in transformers, through files in float32."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))  # of `make test-parity`

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if not (folder / "config.json").exists():
        save_pretrained(model, folder, dtype="float32")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def against_transformers(name: str, model: Pretrained, folder: pathlib.Path, repetitions: int) -> dict:
    """Greedy decoding of NEW tokens behind PROMPT ones and a prefill of LONG, in turns."""
    torch = importlib.import_module("torch")

    peer, random, found = theirs(model, folder), np.random.default_rng(0), {}
    draw = lambda rows, length: random.integers(3, model.config.vocab_size, (rows, length)).astype(np.int32)

    def peer_greedy(ids):
        with torch.inference_mode():
            options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
            given = torch.tensor(ids.astype(np.int64))
            return peer.generate(given, attention_mask=torch.ones_like(given), **options)[:, ids.shape[1] :].numpy()

    def peer_prefill(ids):
        with torch.inference_mode():
            return peer(torch.tensor(ids.astype(np.int64)), use_cache=True, logits_to_keep=1).logits.numpy()

    def own_greedy(ids):
        return [row.tokens for row in generate(model, ids.tolist(), max_new_tokens=NEW, stop_tokens=[])]

    run = jax.jit(lambda params, ids, lengths: prefill(params, model.config, ids, lengths, 2 * LONG, Context()))
    own_prefill = lambda ids: run(model.params, ids, jnp.full(len(ids), ids.shape[1]))[0]
    cases = {
        "greedy, batch 1": (own_greedy, peer_greedy, draw(1, PROMPT)),
        "greedy, batch 16": (own_greedy, peer_greedy, draw(16, PROMPT)),
        "prefill of 512": (own_prefill, peer_prefill, draw(1, LONG)),
    }
    for case, (own, peers, ids) in cases.items():
        runs = {"oasis_jax": functools.partial(own, ids), "transformers": functools.partial(peers, ids)}
        taken = harness.interleave(runs, repetitions=repetitions)
        ratio = taken["transformers"]["median_ms"] / taken["oasis_jax"]["median_ms"]
        ours, others = np.asarray(own(ids)), np.asarray(peers(ids))
        if case.startswith("greedy"):
            alike = f"{np.mean(ours == others):.0%} of tokens equal"
        else:
            alike = f"logits differ by {np.abs(ours - others[:, -1]).max() / np.abs(others).max():.0e} of the largest"
        print(
            f"{name}, {case}: {ratio:.2f}x transformers (aim {AIMS[case]}), "
            f"{taken['oasis_jax']['median_ms']:.0f} against {taken['transformers']['median_ms']:.0f} ms; {alike}",
            flush=True,
        )
        found[f"{name}, {case}"] = {"ratio": ratio, "aim": AIMS[case], "alike": alike, **taken}
    return found


def beside_a_read(name: str, model: Pretrained, repetitions: int) -> dict:
    """A token behind CACHED ones, batch 1, beside a sum over all weights and cached keys and values."""
    config, found = model.config, {}
    weights = [x for x in jax.tree.leaves(model.params) if x.ndim > 1]
    shape = (1, CACHED + 128, config.key_heads, config.head_size)
    entry = lambda seed: jax.random.normal(jax.random.key(seed), shape)
    read = jax.jit(lambda arrays: [x.sum() for x in arrays])
    advance = jax.jit(lambda params, token, caches: step(params, config, token, caches, Context()), donate_argnums=2)
    params = for_steps(model.params, config, model.numerics)
    for storage, store in STORAGES.items():
        caches = tuple(
            KVCache(store(entry(2 * i)), store(entry(2 * i + 1)), jnp.full(1, CACHED)) for i in range(config.num_layers)
        )
        size = sum(x.nbytes for x in jax.tree.leaves([[c.key, c.value] for c in caches]))
        arrays = jax.tree.map(jnp.copy, [[c.key, c.value] for c in caches])
        state = [caches]

        def one(state=state):
            logits, state[0] = advance(params, jnp.array([5]), state[0])
            return logits

        runs = {"a token": one, "plain read": lambda arrays=arrays: read([*weights, *jax.tree.leaves(arrays)])}
        taken = harness.interleave(runs, repetitions=10 * repetitions)
        ratio = taken["a token"]["median_ms"] / taken["plain read"]["median_ms"]
        print(
            f"{name}, {CACHED} cached as {storage}, {size / 2**20:.0f} MiB: a token takes "
            f"{taken['a token']['median_ms']:.1f} ms, {ratio:.2f} times a read of weights and cache",
            flush=True,
        )
        found[f"{name}, {CACHED} cached as {storage}"] = {"ratio": ratio, "cache_bytes": size, **taken}
    return found


def nats_of_int8(name: str, model: Pretrained, rows: int = 8, length: int = 160, given: int = 32) -> dict:
    """The mean loss of text after `given` tokens of it, read token by token against a cache in float and in 8 bits."""
    text = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text()
    ids = model.tokenizer.encode(text)[: rows * (length - 1)].reshape(rows, -1)
    ids = np.insert(ids, 0, model.begin_token or 0, axis=1).astype(np.int32)
    start = jax.jit(
        lambda params, ids, storage: prefill(
            params, model.config, ids, jnp.full(rows, given), length, Context(), storage
        ),
        static_argnums=2,
    )
    more = jax.jit(lambda params, token, caches: step(params, model.config, token, caches, Context()), donate_argnums=2)
    losses = {}
    for storage in STORAGES:
        logits, caches = start(model.params, ids[:, :given], storage)
        taken = []
        for place in range(given, length):
            logprob = jax.nn.log_softmax(logits)
            taken.append(-np.asarray(logprob)[np.arange(rows), ids[:, place]])
            logits, caches = more(model.params, ids[:, place], caches)
        losses[storage] = np.stack(taken)
    difference = losses["int8"] - losses["float"]
    error = difference.mean(0).std(ddof=1) / rows**0.5  # over rows
    print(
        f"{name}: {losses['float'].mean():.4f} nats a token with keys and values in float, {difference.mean():+.5f} "
        f"(standard error {error:.5f} over {rows} rows) in 8 bits, {difference.size} tokens",
        flush=True,
    )
    found = {"nats_float": losses["float"].mean(), "difference": difference.mean(), "error": error}
    return {f"{name}, 8 bits": {key: float(x) for key, x in found.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("transformers", "read", "int8"))
    parser.add_argument("--repetitions", type=int, default=3)
    args, comparisons, started = parser.parse_args(), {}, time.time()
    wanted = lambda part: args.part in (None, part)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        models = {"20M random": random_small(folder / "small"), "SmolLM2-135M": load_pretrained(fetch())}
        for name, model in models.items():
            place = folder / ("small" if name.startswith("20M") else "smollm2")
            if wanted("transformers"):
                comparisons |= against_transformers(name, model, place, args.repetitions)
            if wanted("read"):
                comparisons |= beside_a_read(name, model, args.repetitions)
        if wanted("int8"):
            comparisons |= nats_of_int8("SmolLM2-135M", models["SmolLM2-135M"])
    name = "decode-transformers" + (f"-{args.part}" if args.part else "")
    harness.save(name, comparisons, seconds=time.time() - started)


if __name__ == "__main__":
    main()
