"""Folders and files that may lie in an object store: gs:// and s3://."""

from oasis_jax.storage.mirror import Mirror, cache_folder, fetched, fetched_glob
from oasis_jax.storage.paths import (
    Path,
    as_path,
    created,
    in_words,
    is_remote,
    listing,
    local_path,
    move,
    reach,
    read_bytes,
    remove_tree,
    write_bytes,
)

__all__ = [
    "Mirror",
    "Path",
    "as_path",
    "cache_folder",
    "created",
    "fetched",
    "fetched_glob",
    "in_words",
    "is_remote",
    "listing",
    "local_path",
    "move",
    "reach",
    "read_bytes",
    "remove_tree",
    "write_bytes",
]
