"""Loads a folder on one device and on a mesh of eight, and prints what it found: see test_loading.py."""

import json
import sys

import jax
import numpy as np

from oasis_jax.config import MeshConfig
from oasis_jax.pretrained import load_pretrained


def main(folder: str, mesh: dict) -> dict:
    alone, sharded = load_pretrained(folder), load_pretrained(folder, mesh=MeshConfig(**mesh))
    leaves, others = (jax.tree_util.tree_leaves_with_path(x.params) for x in (alone, sharded))
    different = [jax.tree_util.keystr(path) for (path, a), (_, b) in zip(leaves, others) if not np.array_equal(a, b)]
    devices = {jax.tree_util.keystr(path): len(x.sharding.device_set) for path, x in others}
    query = sharded.params["layers"]["attention"]["query"]
    return {
        "leaves": [len(leaves), len(others)],
        "different": different,
        "devices": sorted(set(devices.values())),
        "query": [list(query.shape), list(query.addressable_shards[0].data.shape)],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
