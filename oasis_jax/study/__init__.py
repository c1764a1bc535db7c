"""Studies: a matrix of methods, arms and seeds, trained and measured from equal starts, and what it says of claims."""

from oasis_jax.study import claims
from oasis_jax.study.design import Cell, Claim, Outcome, Study

__all__ = ["Cell", "Claim", "Outcome", "Study", "claims"]
