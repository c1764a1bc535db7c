"""Which cases of a long list every run of the suite takes, and which only `make test-slow`."""

from collections.abc import Container, Iterable

import pytest


def sampled(values: Iterable, now: Container) -> list:
    """For `pytest.mark.parametrize`: the values, of several arguments tuples, in `now` always, the others behind the
    marker `slow`.
    """

    def later(value):
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in now else later(value) for value in values]
