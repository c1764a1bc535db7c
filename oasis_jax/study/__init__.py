"""Studies: a matrix of methods, arms and seeds, trained from equal starts or forms of one model, measured, and what it
says of claims.
"""

from oasis_jax.study import claims
from oasis_jax.study.design import Cell, Claim, Form, Outcome, Source, Study

__all__ = ["Cell", "Claim", "Form", "Outcome", "Source", "Study", "claims"]
