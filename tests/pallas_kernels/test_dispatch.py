"""The choice of a backend: by default the first that can serve, by name that one or an error."""

import pytest

import pallas_kernels
from pallas_kernels.dispatch import Unavailable, dispatch


def cannot(x):
    raise Unavailable("needs another device")


TABLE = {"fast": cannot, "slow": lambda x: x + 1, "plain": lambda x: x + 2}


def test_the_default_falls_through_to_the_first_that_can_serve():
    assert dispatch("operator", TABLE, None)(1) == 2


def test_a_name_forces_a_backend():
    assert dispatch("operator", TABLE, "plain")(1) == 3
    with pytest.raises(ValueError, match="fast: needs another device; there are: fast, slow, plain"):
        dispatch("operator", TABLE, "fast")(1)


def test_an_unknown_name_lists_what_there_is_and_the_nearest():
    with pytest.raises(ValueError, match=r"operator has no 'plian' \(did you mean 'plain'\?\); there are: fast, slow, plain"):
        dispatch("operator", TABLE, "plian")
    with pytest.raises(ValueError, match="has no 3; there are"):
        dispatch("operator", TABLE, 3)


def test_no_backend_at_all_says_why():
    with pytest.raises(ValueError, match="cannot be served by fast: needs another device"):
        dispatch("operator", {"fast": cannot}, None)(1)


def test_implementations_are_listed_fastest_first():
    assert pallas_kernels.implementations("null_attention") == ("xla", "reference")
    assert pallas_kernels.implementations("depth_route") == ("xla", "reference")
    with pytest.raises(ValueError, match="no 'attention'; there are: null_attention, depth_route"):
        pallas_kernels.implementations("attention")
