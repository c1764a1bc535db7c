"""From text to batches: tokenizing beside the library alone, reading prepared shards, a step with the pipeline beside
one on a constant batch, and the first batch of a large corpus.

python benchmarks/data.py [--repetitions 7] [--folder DIR] [--gigabytes 10]

The text is Python's standard library, tokenized by a BPE of 8,192 tokens. The large corpus is its training shards, as
links under other names until there are so many gigabytes: what is measured is what opening and laying out costs, not
a disk. DIR (a temporary folder where not given) needs room for about 100 MB.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import time

import _harness as harness
import numpy as np

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.data import load_corpus, stdlib, train_batches
from oasis_jax.data.packing import PACKINGS
from oasis_jax.data.tokenizers import BPETokenizer
from oasis_jax.model.batch import check_ids
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.state import new_state
from oasis_jax.training.step import make_step

LENGTH, BATCH = 1024, 16
COPIES = 4  # of the text, each document with another end, so that none is left out as a repetition


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", type=pathlib.Path, default=None)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = pathlib.Path(folder)
        documents = [document for file in stdlib.read_files() for document in file.documents]
        tokenizer = BPETokenizer.train(documents, 8192)
        config = write_text(folder, documents)
        comparisons = {"tokenizing": tokenizing(tokenizer, documents, arguments.repetitions)}
        comparisons["preparing"], rates = preparing(config, tokenizer, documents, folder)
        data = dataclasses.replace(config, corpus="prepared", pattern=str(folder / "prepared"), tokenizer="bpe")
        comparisons["reading"], read = reading(data, arguments.repetitions)
        comparisons["step"] = training(data, arguments.repetitions)
        first = first_batches(data, folder, arguments.gigabytes)
    harness.save("data", comparisons, tokens_per_second=read, preparing=rates, first_batch=first)


def write_text(folder: pathlib.Path, documents: list[bytes]) -> DataConfig:
    """The text as .jsonl files, and the config that reads it."""
    (folder / "text").mkdir()
    for copy in range(COPIES):
        lines = (json.dumps({"text": f"{text.decode(errors='replace')}\n# {copy}"}) for text in documents)
        (folder / "text" / f"{copy}.jsonl").write_text("\n".join(lines))
    pattern = f"{folder}/text/*.jsonl"
    return DataConfig(
        corpus="files", pattern=pattern, tokenizer="bpe", bpe_vocab_size=8192, sequence_length=LENGTH, batch_size=BATCH
    )


def tokenizing(tokenizer: BPETokenizer, documents: list[bytes], repetitions: int) -> dict:
    """All documents through this library and through `tokenizers` alone, which gets texts and gives its own objects."""
    texts, library = [document.decode() for document in documents], tokenizer._library
    runs = {
        "tokenizers alone": lambda: library.encode_batch_fast(texts, add_special_tokens=False) and None,
        "encode_all": lambda: sum(map(len, tokenizer.encode_all(documents))),
    }
    found = harness.interleave(runs, repetitions=repetitions)
    share = found["tokenizers alone"]["median_ms"] / found["encode_all"]["median_ms"]
    found["encode_all"]["share"] = share
    print(f"tokenizing {sum(map(len, documents)) / 1e6:.1f} MB: {100 * share:.0f} % of the speed of tokenizers alone")
    return found


def preparing(config: DataConfig, tokenizer: BPETokenizer, documents: list[bytes], folder: pathlib.Path):
    """The whole of `oasis_jax prepare`, once with each number of processes, beside `tokenizers` alone on texts that
    are in memory.
    """
    from oasis_jax.data import prepare  # here: it needs array_record

    texts = [f"{text.decode(errors='replace')}\n# {copy}" for copy in range(COPIES) for text in documents]
    cores, times = len(os.sched_getaffinity(0)), {}
    for name, workers in {"one process": 1, f"{cores} processes": cores}.items():
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        start = time.perf_counter()
        prepare.prepare(config, tokenizer, folder / "prepared", workers=workers, shard_bytes=8 * 2**20)
        times[name] = time.perf_counter() - start
        start = time.perf_counter()
        for at in range(0, len(texts), 64):
            tokenizer._library.encode_batch_fast(texts[at : at + 64], add_special_tokens=False)
        times[f"tokenizers alone, beside {name}"] = alone = time.perf_counter() - start
        megabytes = sum(len(text) for text in texts) / 1e6
        print(f"preparing {megabytes:.0f} MB with {name}: {100 * alone / times[name]:.0f} % of tokenizers alone")
    return {name: {"median_ms": 1e3 * taken} for name, taken in times.items()}, {
        "megabytes": megabytes,
        "share": {name: times[f"tokenizers alone, beside {name}"] / times[name] for name in list(times)[::2]},
    }


def reading(data: DataConfig, repetitions: int, batches: int = 64):
    """Batches of prepared shards as fast as they come."""
    runs, opened = {}, []
    for packing in PACKINGS:
        asked = dataclasses.replace(data, packing=packing)
        opened.append(train_batches(load_corpus(asked, seed=0).train, asked, seed=0))
        runs[packing] = lambda iterator=opened[-1]: sum(next(iterator)["inputs"].size for _ in range(batches)) and None
    found = harness.interleave(runs, repetitions=repetitions)
    for iterator in opened:
        iterator.close()
    rates = {name: 1e3 * batches * LENGTH * BATCH / row["median_ms"] for name, row in found.items()}
    for name, rate in rates.items():
        print(f"reading, {name}: {rate / 1e6:.2f} million tokens/s")
    return found, rates


def training(data: DataConfig, repetitions: int) -> dict:
    """One step of 20M parameters, with the pipeline and without; they take turns, so that load meets both."""
    data = dataclasses.replace(data, packing="best_fit", sequence_length=128, batch_size=4)
    model = ModelConfig(preset="residual", num_layers=6, width=448, num_heads=7, mlp_dim=1344)
    config, corpus = Config(model=model, data=data), load_corpus(data, seed=0)
    config = with_sizes(config, corpus)
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1))
    step, state, placement = make_step(config, mesh), new_state(config, mesh), place(config, mesh)
    batches = train_batches(corpus.train, data, seed=0)
    constant = placement.put(next(batches))
    print(f"{sum(x.size for x in _leaves(state.params)) / 1e6:.1f}M parameters")

    def run(batch):
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    def from_pipeline():
        examples = next(batches)
        check_ids(config.model, inputs=examples["inputs"], targets=examples["targets"])
        return run(placement.put(examples))

    runs = {"constant batch": lambda: run(constant), "pipeline": from_pipeline}
    found = harness.interleave(runs, repetitions=3 * repetitions)
    batches.close()
    ratio = found["pipeline"]["median_ms"] / found["constant batch"]["median_ms"]
    least = found["pipeline"]["least_ms"] / found["constant batch"]["least_ms"]
    print(f"a step with the pipeline takes {ratio:.3f} times one on a constant batch (of the least times {least:.3f})")
    found["pipeline"] |= {"over_constant": ratio, "over_constant_least": least}
    return found


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def first_batches(data: DataConfig, folder: pathlib.Path, gigabytes: float) -> dict:
    """Seconds until the first batch of a large corpus is there, from a process that has read nothing of it."""
    source, out = pathlib.Path(data.pattern), folder / "large"
    out.mkdir()
    index = json.loads((source / "index.json").read_bytes())
    shards, copies, size = index["parts"]["train"]["shards"], [], 0
    while size < gigabytes * 1e9:
        shard = json.loads(json.dumps(shards[len(copies) % len(shards)]))
        for entry in (shard, shard["lengths"]):
            name = f"{len(copies):05d}-{entry['file']}"
            os.link(source / entry["file"], out / name)
            entry["file"] = name
        size += shard["size"]
        copies.append(shard)
    index["parts"]["train"]["shards"] = copies
    for shard in index["parts"]["heldout"]["shards"]:
        for entry in (shard, shard["lengths"]):
            os.link(source / entry["file"], out / entry["file"])
    (out / "index.json").write_text(json.dumps(index))
    found = {"gigabytes": size / 1e9, "shards": len(copies), "documents": sum(shard["documents"] for shard in copies)}
    print(f"{size / 1e9:.1f} GB in {len(copies)} shards (links to {len(shards)}), {found['documents']:,} documents")
    for packing in PACKINGS:
        asked = dataclasses.replace(data, pattern=str(out), packing=packing)
        start = time.perf_counter()
        batches = train_batches(load_corpus(asked, seed=0).train, asked, seed=0)
        assert np.isfinite(next(batches)["weights"]).all()
        found[packing] = time.perf_counter() - start
        batches.close()
        print(f"first batch, {packing}: {found[packing]:.2f} s")
    return found


if __name__ == "__main__":
    main()
