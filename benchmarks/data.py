"""From text to batches: tokenizing beside the library alone, reading prepared shards, a step with the pipeline beside
one on a constant batch, and the first batch of a large corpus.

python benchmarks/data.py [--repetitions 7] [--folder DIR] [--gigabytes 10]

The text is Python's standard library, tokenized by a BPE of 8,192 tokens. The large corpus is its training shards, as
links under other names until there are so many gigabytes: what is measured is what opening and laying out costs, not
a disk. DIR (a temporary folder where not given) needs room for about 100 MB.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import _harness as harness
import numpy as np

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.data import load_corpus, prepare, stdlib, train_batches
from oasis_jax.data.packing import PACKINGS
from oasis_jax.data.tokenizers import BPETokenizer
from oasis_jax.model.batch import check_ids
from oasis_jax.placement import make_mesh, place
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.state import new_state
from oasis_jax.training.step import make_step

LENGTH, BATCH = 1024, 16
COPIES = 4  # of the text, each document with another end, so that none is left out as a repetition
PREPARED_COPIES = 8  # where preparing is timed: it makes more than one shard


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
        config = write_text(folder / "text", documents, COPIES)
        comparisons = {"tokenizing": tokenizing(tokenizer, documents, arguments.repetitions)}
        comparisons["preparing"], prepared = preparing(folder, tokenizer, documents, max(3, arguments.repetitions // 2))
        prepare.prepare(config, tokenizer, folder / "prepared", shard_bytes=8 * 2**20)
        data = dataclasses.replace(config, corpus="prepared", pattern=str(folder / "prepared"), tokenizer="bpe")
        comparisons["reading"], read = reading(data, arguments.repetitions)
        comparisons["step"] = training(data, arguments.repetitions)
        first = first_batches(data, folder, arguments.gigabytes)
    harness.save("data", comparisons, tokens_per_second=read, preparing=prepared, first_batch=first)


def write_text(folder: pathlib.Path, documents: list[bytes], copies: int) -> DataConfig:
    """The text as .jsonl files, and the config that reads it."""
    folder.mkdir()
    for copy in range(copies):
        lines = (json.dumps({"text": f"{text.decode(errors='replace')}\n# {copy}"}) for text in documents)
        (folder / f"{copy}.jsonl").write_text("\n".join(lines))
    pattern = f"{folder}/*.jsonl"
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


def preparing(folder: pathlib.Path, tokenizer: BPETokenizer, documents: list[bytes], repetitions: int):
    """The command `oasis_jax prepare`, from its start to its end, with one process and with one a core, beside
    `tokenizers` alone on texts that are in memory, with as many threads as cores.
    """
    texts = [f"{text.decode(errors='replace')}\n# {copy}" for copy in range(PREPARED_COPIES) for text in documents]
    source = write_text(folder / "more", documents, PREPARED_COPIES).pattern
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "oasis_tokenizer.json").write_text(tokenizer.to_json())
    cores = len(os.sched_getaffinity(0))

    def alone():
        for at in range(0, len(texts), 1000):  # more at once take a gigabyte and more
            tokenizer._library.encode_batch_fast(texts[at : at + 1000], add_special_tokens=False)

    def command(workers: int):
        shutil.rmtree(folder / "timed", ignore_errors=True)
        flags = ["--source", source, "--tokenizer", folder / "tokenizer", "--out", folder / "timed"]
        words = [sys.executable, "-m", "oasis_jax", "prepare", *flags, "--workers", str(workers)]
        subprocess.run(words, check=True, capture_output=True)

    runs = {"tokenizers alone": alone} | {
        f"{count} processes" if count > 1 else "one process": functools.partial(command, count)
        for count in dict.fromkeys([1, cores])
    }
    found = harness.interleave(runs, repetitions=repetitions)
    megabytes = sum(len(text) for text in texts) / 1e6
    for name in list(runs)[1:]:
        found[name]["share"] = share = found["tokenizers alone"]["median_ms"] / found[name]["median_ms"]
        print(f"preparing {megabytes:.0f} MB with {name}: {100 * share:.0f} % of the speed of tokenizers alone")
    return found, {"megabytes": megabytes, "load": os.getloadavg()[0]}


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
