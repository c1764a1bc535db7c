"""One of several processes that saves a made-up training state, or restores it elsewhere: see
test_restore_elsewhere.py.

restore_elsewhere.py FOLDER save|restore MESH COORDINATOR COUNT INDEX
"""

import json
import sys

import jax
import numpy as np

from oasis_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from oasis_jax.data import load_corpus, train_batches
from oasis_jax.placement import make_mesh, place
from oasis_jax.storage import as_path
from oasis_jax.training.checkpoints import Checkpoints, Keep
from oasis_jax.training.description import describe
from oasis_jax.training.distributed import Processes, batch_part, start
from oasis_jax.training.loop import with_sizes
from oasis_jax.training.state import abstract_state

STEP = 3


def made_up(number: int, x: jax.ShapeDtypeStruct) -> np.ndarray:
    """The values of a leaf, the same everywhere: random bits, for floating point of ordinary size."""
    random = np.random.default_rng(number)
    if np.issubdtype(x.dtype, np.floating):
        return random.normal(size=x.shape).astype(x.dtype)
    return random.integers(0, 1000, x.shape).astype(x.dtype)


def is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def placed_state(abstract):
    """Every leaf of a state with its made-up values, each device's part made where it lies."""

    def make(number, x):
        if is_key(x):
            return jax.jit(lambda: jax.random.key(number), out_shardings=x.sharding)()
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: made_up(number, x)[index])

    leaves, tree = jax.tree.flatten(abstract)
    return tree.unflatten([make(number, x) for number, x in enumerate(leaves)])


def check(state, abstract) -> int:
    """Compares what this process holds of a restored state, bit for bit; returns the number of its parts."""
    count = 0
    for number, (x, wanted) in enumerate(zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim), (number, x.sharding, wanted.sharding)
        data = jax.random.key_data(x) if is_key(x) else x
        whole = np.asarray(jax.random.key_data(jax.random.key(number))) if is_key(x) else made_up(number, wanted)
        for shard in data.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
            count += 1
    return count


def main(folder: str, action: str, sizes: str, coordinator: str, count: str, index: str) -> None:
    if int(count) > 1:
        start(Processes(coordinator, int(count), int(index)))
    config = Config(
        model=ModelConfig(preset="oasis", inputs="vectors", num_layers=2, width=24, num_heads=4, mlp_dim=56),
        data=DataConfig(corpus="trigger", sequence_length=8, batch_size=16, trigger_dim=6),
        mesh=MeshConfig(**json.loads(sizes)),
    )
    corpus, mesh = load_corpus(config.data, seed=0), make_mesh(config.mesh)
    config = with_sizes(config, corpus)
    abstract = abstract_state(config, mesh)
    part, parts = batch_part(place(config, mesh).sharding(("batch",)), config.data.batch_size)
    batches = train_batches(corpus.train, config.data, seed=0, part=part, parts=parts)
    with Checkpoints(as_path(folder, "FOLDER"), keep=Keep(1), say=print) as checkpoints:
        if action == "save":
            for _ in range(STEP):
                next(batches)
            checkpoints.save(
                placed_state(abstract), step=STEP, data_state=batches.get_state(), description=describe(config, corpus)
            )
            found = 0
        else:
            resumed = checkpoints.resume(config, mesh)
            assert resumed.step == STEP
            found = check(resumed.state, abstract)
            batches.set_state(resumed.data_state)
    rows = next(batches)["inputs"][:, -1].tolist()
    print(json.dumps({"part": part, "parts": parts, "rows": rows, "compared": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
