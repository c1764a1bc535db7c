"""Time to trace and compile the evaluation of a batch, with layers as a loop and one by one.

JAX_PLATFORMS=cpu python benchmarks/evaluation_compile.py [--layers 8,30]
"""

import argparse
import time

import jax
from _harness import save

from oasis_jax.config import ModelConfig
from oasis_jax.evaluation import choose
from oasis_jax.evaluation.passes import DecoderPass, lower
from oasis_jax.model import unrolled
from oasis_jax.model.decoder import parameter_shapes

WIDTH, BATCH, LENGTH = 576, 8, 256


def seconds(layers: int, loop: bool) -> float:
    """Of processor time, which other work on the machine hardly changes."""
    config = ModelConfig(
        preset="residual", num_layers=layers, width=WIDTH, num_heads=9, num_kv_heads=3, vocab_size=8192
    )
    shape = jax.ShapeDtypeStruct((BATCH, LENGTH), "int32")
    batch = {"inputs": shape, "targets": shape, "weights": jax.ShapeDtypeStruct(shape.shape, "float32")}
    allowed = unrolled._loops
    unrolled._loops = allowed if loop else lambda *_: False
    jax.clear_caches()
    start = time.process_time()
    lower(DecoderPass(config), parameter_shapes(config), batch, choose(["default"])).compile()
    unrolled._loops = allowed
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="8,30")
    results = {}
    for layers in map(int, parser.parse_args().layers.split(",")):
        found = {name: seconds(layers, loop) for name, loop in (("loop", True), ("one by one", False))}
        results[f"{layers} layers"] = found | {"ratio": found["one by one"] / found["loop"]}
        print(f"{layers} layers: {found['loop']:.1f} s in a loop, {found['one by one']:.1f} s one by one", flush=True)
    save("evaluation_compile", results)


if __name__ == "__main__":
    main()
