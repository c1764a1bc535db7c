"""Which cases of a long list every run of the suite takes, and which only `make test-slow`."""

from collections.abc import Container, Iterable

import pytest


def sampled(values: Iterable, now: Container) -> list:
    """For `pytest.mark.parametrize`: the values in `now` always, the others behind the marker `slow`."""
    return [value if value in now else pytest.param(value, marks=pytest.mark.slow) for value in values]
