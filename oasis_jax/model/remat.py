"""What the backward pass recomputes instead of storing, by name."""

from collections.abc import Callable

import jax

# None: recompute everything. dots stores the results of matrix products without batch dimensions (projections, not
#   scores).
POLICIES = {"layer": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematerialized(function: Callable, name: str) -> Callable:
    """The function under the remat policy of that name; "none" stores all its intermediate values."""
    return function if name == "none" else jax.checkpoint(function, policy=POLICIES[name])
