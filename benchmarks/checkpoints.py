"""What it costs to look at a checkpoint's checksums, beside the restore that it belongs to.

JAX_PLATFORMS=cpu python benchmarks/checkpoints.py [--width 512] [--repetitions 9]

A state whose numbers are all random (moments of zero would be compressed to nothing) is saved once. Timed are the
restore by the storage library alone, the look at files and at arrays alone, and what a run does: the restore with both
looks beside it in threads. Files lie in the system's cache. "cpu" is the time of all cores together, which says what
the looks cost where no core is free.
"""

import argparse
import pathlib
import tempfile

import jax
import orbax.checkpoint as ocp
from _harness import interleave, save

from oasis_jax.config import Config, MeshConfig, ModelConfig
from oasis_jax.placement import make_mesh
from oasis_jax.training import manifest
from oasis_jax.training.array_checksums import checksums
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.state import TrainState, abstract_state, new_state


def random_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """A state whose moments are random, too."""
    state = new_state(config, mesh)
    noise = lambda x: jax.random.normal(jax.random.key(x.size), x.shape) if x.dtype == "float32" else x
    return state._replace(opt_state=jax.tree.map(noise, state.opt_state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    model = ModelConfig(
        preset="oasis", num_layers=8, width=args.width, num_heads=8, mlp_dim=11 * args.width // 4, vocab_size=8192
    )
    config, mesh = Config(model=model), make_mesh(MeshConfig(), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as scratch:
        workdir = pathlib.Path(scratch)
        state, abstract = random_state(config, mesh), abstract_state(config, mesh)
        with Checkpoints(workdir, keep=Keep(1), say=print) as checkpoints:
            checkpoints.save(state, step=1, data_state={}, description={})
        folder = workdir / "checkpoints" / "1"
        with Checkpoints(workdir, keep=None, say=print) as checkpoints, ocp.CheckpointManager(folder.parent) as alone:
            rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
            asked = {"params": ocp.args.StandardRestore(abstract.params), "rest": ocp.args.StandardRestore(rest)}
            results = interleave(
                {
                    "restore alone": lambda: list(alone.restore(1, args=ocp.args.Composite(**asked)).values()),
                    "look at files alone": lambda: look(folder),
                    "look at arrays alone": lambda: list(checksums(state).values()),
                    "restore and both": lambda: checkpoints.first_whole(
                        lambda step: checkpoints.state(1, abstract), [1]
                    ),
                },
                repetitions=args.repetitions,
            )
    size = sum(x.nbytes for x in jax.tree.leaves(state._replace(rng=None)))
    base = results["restore alone"]["median_ms"]
    print(f"\n{size / 1e6:.0f} MB of arrays\n{'':24s}{'median':>12s}{'least':>12s}{'of a restore':>14s}{'cpu':>12s}")
    for name, row in results.items():
        row["share"] = row["median_ms"] / base
        times = f"{row['median_ms']:9.1f} ms{row['least_ms']:9.1f} ms"
        print(f"{name:24s}{times}{100 * row['share']:12.1f} %{row['cpu_ms']:9.1f} ms")
    save("checkpoints", {"restore": results}, megabytes=size / 1e6)


def look(folder: pathlib.Path) -> None:
    with manifest.Inspection(folder) as inspection:
        inspection.finish()


if __name__ == "__main__":
    main()
