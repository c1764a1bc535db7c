"""Temporary memory and compile time of a whole training step (loss, gradients, AdamW) against depth, by the
compilers alone: nothing is run.

JAX_PLATFORMS=cpu python benchmarks/stack_memory.py [--target cpu|v5e] [--depths 8,16,32,64] [--write]

v5e compiles for one TPU v5e chip and needs libtpu (`pip install "jax[tpu]"`), but no TPU. A unit is one activation [B,
T, D] in bfloat16.
Seconds: to trace and lower the step + to compile it, of processor time, which other work on the machine hardly changes.
--write replaces this target's table in docs/memory.md.
"""

import argparse
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


def compiled(options: dict, layers: int, device) -> tuple[float, float, float]:
    """(temporary units, seconds to trace and lower, seconds to compile) of the step with remat=layer."""
    import jax

    from oasis_jax.config import Config, DataConfig, ModelConfig
    from oasis_jax.placement import make_mesh
    from oasis_jax.training.plan import abstract_batch
    from oasis_jax.training.state import abstract_state
    from oasis_jax.training.step import make_step

    model = ModelConfig(
        num_layers=layers, width=WIDTH, num_heads=4, vocab_size=8192, dtype="bfloat16", remat="layer", **options
    )
    config = Config(model=model, data=DataConfig(batch_size=BATCH, sequence_length=LENGTH))
    mesh = make_mesh(config.mesh, [device])
    jax.clear_caches()  # of what another depth has traced
    start = time.process_time()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = make_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))
    between = time.process_time()
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes / (2 * BATCH * LENGTH * WIDTH), between - start, time.process_time() - between


def target_device(target: str):
    import jax

    from oasis_jax.training.plan import tpu_devices

    return jax.devices("cpu")[0] if target == "cpu" else tpu_devices(f"{target}:2x2")[0]


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
    device, depths = target_device(arguments.target), [int(depth) for depth in arguments.depths.split(",")]
    lines = [
        f"| {arguments.target} | " + " | ".join(f"L={depth}" for depth in depths) + " |",
        "|---" * (len(depths) + 1) + "|",
    ]
    print("\n".join(lines), flush=True)
    for name, options in CASES.items():
        if arguments.cases in name:
            print(f"| {name} |", end="", flush=True)
            lines.append(f"| {name} |")
            for depth in depths:
                units, traced, seconds = compiled(options, depth, device)
                cell = f" {units:.0f} units, {traced:.1f} + {seconds:.1f} s |"
                print(cell, end="", flush=True)
                lines[-1] += cell
            print(flush=True)
    if arguments.write:
        write(arguments.target, "\n".join(lines))


if __name__ == "__main__":
    main()
