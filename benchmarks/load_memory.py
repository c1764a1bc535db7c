"""Host memory that `load_pretrained` needs beside the parameters it makes, at its peak.

JAX_PLATFORMS=cpu python benchmarks/load_memory.py [--types bfloat16,float32]

A random Llama (0.16 billion parameters, a vocabulary that has to be padded) is written to a temporary folder and loaded
in a process of its own, on a CPU, where parameters lie in host memory, too. A small one is loaded first, so that what
Python and the compiler need is there already. Counted is memory of the process alone, not the pages of files that the
system keeps: Linux, sampled every millisecond. The bound is that of the largest tensor in float32, and 10 %.
"""

import argparse
import json
import multiprocessing
import pathlib
import tempfile
import threading
import time

CONFIG = dict(
    model_type="llama", hidden_act="silu", hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
    num_attention_heads=16, num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=2048,
    tie_word_embeddings=False, vocab_size=32003,
)  # fmt: skip
SMALL = CONFIG | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=101)


def write(folder: pathlib.Path, config: dict, dtype: str) -> int:
    """Writes a model; returns how many values its largest tensor has."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy

    from oasis_jax.model.decoder import parameter_specs
    from oasis_jax.pretrained.families import FAMILIES, read_model_config
    from oasis_jax.pretrained.mapping import file_shape, file_specs

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model, random = read_model_config(config, "config.json"), np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    tensors = {}
    for entry in FAMILIES["llama"].tensors(model):
        shape = file_shape(entry, file_specs(entry, parameter_specs(model), model.vocab_size))
        for layer in range(model.num_layers) if entry.of_layers else (0,):
            values = random.standard_normal(shape, dtype=np.float32)
            tensors[entry.name.format(layer=layer)] = values.astype(kind)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return max(x.size for x in tensors.values())


def used() -> int:
    """Bytes of this process that no file backs."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say how much memory a process uses")


def load(folder: str, small: str, queue) -> None:
    """Puts (bytes of the parameters, most bytes used beside what was used before)."""
    import jax

    from oasis_jax import load_pretrained

    load_pretrained(small)
    peak, done = [base := used()], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], used())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = jax.block_until_ready(load_pretrained(folder).params)
    done.set()
    watcher.join()
    queue.put((sum(x.nbytes for x in jax.tree.leaves(params)), peak[0] - base))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="bfloat16,float32", help="of the tensors in the file")
    context, failed = multiprocessing.get_context("spawn"), False
    for dtype in parser.parse_args().types.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder, small = pathlib.Path(scratch, "model"), pathlib.Path(scratch, "small")
            largest = 4 * write(folder, CONFIG, dtype)
            write(small, SMALL, dtype)
            queue = context.Queue()
            process = context.Process(target=load, args=(str(folder), str(small), queue))
            process.start()
            placed, most = queue.get()
            process.join()
        beside, bound = most - placed, 1.1 * largest
        failed |= beside > bound
        print(
            f"{dtype:8}: parameters {placed / 2**20:.0f} MiB, at most {beside / 2**20:.0f} MiB beside them; "
            f"bound {bound / 2**20:.0f} MiB ({'kept' if beside <= bound else 'NOT KEPT'})",
            flush=True,
        )
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
