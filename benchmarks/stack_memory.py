"""Temporary memory and compile time of a training step's loss and gradients against depth, by the compilers alone: nothing is run.

JAX_PLATFORMS=cpu python benchmarks/stack_memory.py [--target cpu|v5e] [--depths 8,16,32,64] [--write]

v5e compiles for one TPU v5e chip and needs libtpu (`pip install "jax[tpu]"`), but no TPU. A unit is one activation [B, T, D] in bfloat16.
--write replaces this target's table in docs/memory.md.
"""

import argparse
import os
import pathlib
import time

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "memory.md"
BATCH, LENGTH, WIDTH = 16, 512, 512
CASES = {
    "residual, loops": dict(preset="residual", stack="scan"),
    "residual, one by one": dict(preset="residual", stack="unroll"),
    "full delta routing (attnres), loops": dict(preset="attnres", stack="scan"),
    "full delta routing (attnres), one by one": dict(preset="attnres", stack="unroll"),
    "blocks (oasis_blocks, 8), loops": dict(preset="oasis_blocks", stack="scan"),
    "blocks (oasis_blocks, 8), one by one": dict(preset="oasis_blocks", stack="unroll"),
    "cumulative (oasis), loops": dict(preset="oasis", stack="scan"),
    "cumulative (oasis), one by one": dict(preset="oasis", stack="unroll"),
}


def compiled(options: dict, layers: int, mesh):
    """(temporary units, seconds to compile) of loss and gradients with remat=layer, on the one device of a mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from oasis_jax import ModelConfig
    from oasis_jax.attention import unconstrained
    from oasis_jax.stacked import unstack_layers
    from oasis_jax.training.sharding import parameter_shapes
    from oasis_jax.training.step import training_loss

    config = ModelConfig(num_layers=layers, width=WIDTH, num_heads=4, vocab_size=8192, dtype="bfloat16", remat="layer", **options)
    sharding = NamedSharding(mesh, PartitionSpec())
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    shapes = parameter_shapes(config)
    if config.stack == "unroll":
        shapes = jax.eval_shape(unstack_layers, shapes)
    params = jax.tree.map(lambda x: place(x.shape, x.dtype), shapes)
    batch = {name: place((BATCH, LENGTH), kind) for name, kind in (("inputs", "int32"), ("targets", "int32"), ("weights", "float32"))}
    function = lambda params, batch: training_loss(params, batch, config, unconstrained, scan=config.stack == "scan")  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # operators choose their kernels by it
        lowered = jax.jit(jax.grad(function)).lower(params, batch)
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes / (2 * BATCH * LENGTH * WIDTH), time.perf_counter() - start


def target_mesh(target: str):
    import jax
    from jax.experimental import topologies
    from jax.sharding import AxisType

    devices = jax.devices("cpu") if target == "cpu" else topologies.get_topology_desc(f"{target}:2x2", platform="tpu").devices
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:1])


def write(target: str, table: str) -> None:
    """Puts the table between its target's markers."""
    begin, end = f"<!-- {target} -->", f"<!-- end of {target} -->"
    text = PAGE.read_text()
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    PAGE.write_text(f"{head}\n{table}\n{tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("cpu", "v5e"), default="cpu")
    parser.add_argument("--depths", default="8,16,32,64")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.target != "cpu":
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
        )
    mesh, depths = target_mesh(arguments.target), [int(depth) for depth in arguments.depths.split(",")]
    lines = [f"| {arguments.target} | " + " | ".join(f"L={depth}" for depth in depths) + " |", "|---" * (len(depths) + 1) + "|"]
    print("\n".join(lines), flush=True)
    for name, options in CASES.items():
        if arguments.cases in name:
            print(f"| {name} |", end="", flush=True)
            lines.append(f"| {name} |")
            for depth in depths:
                units, seconds = compiled(options, depth, mesh)
                cell = f" {units:.0f} units, {seconds:.1f} s |"
                print(cell, end="", flush=True)
                lines[-1] += cell
            print(flush=True)
    if arguments.write:
        write(arguments.target, "\n".join(lines))


if __name__ == "__main__":
    main()
