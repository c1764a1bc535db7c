"""What the numerics of evaluation have in common: they know the full names of what they see."""

import copy

from oasis_jax.model.numerics import Numerics


class Named(Numerics):
    """Numerics with `scope`, the start of the full name of everything that they are shown: "layer0.attention."."""

    def __init__(self):
        self.scope = ""

    def within(self, scope: str) -> "Named":
        part = copy.copy(self)
        part.scope = f"{self.scope}{scope}."
        return part
