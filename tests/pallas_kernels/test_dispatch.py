"""The choice of a backend: by default the first that can serve, by name that one or an error."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels
from pallas_kernels.dispatch import Unavailable, dispatch, explain_call, target_device


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
    with pytest.raises(
        ValueError, match=r"operator has no 'plian' \(did you mean 'plain'\?\); there are: fast, slow, plain"
    ):
        dispatch("operator", TABLE, "plian")
    with pytest.raises(ValueError, match="has no 3; there are"):
        dispatch("operator", TABLE, 3)


def test_no_backend_at_all_says_why():
    with pytest.raises(ValueError, match="cannot be served by fast: needs another device"):
        dispatch("operator", {"fast": cannot}, None)(1)


def test_implementations_are_listed_fastest_first():
    for operator in ("null_attention", "depth_route"):
        assert pallas_kernels.implementations(operator)[-2:] == ("xla", "reference")
    with pytest.raises(ValueError, match="no 'attention'; there are: null_attention, depth_route"):
        pallas_kernels.implementations("attention")


def test_explain_says_which_backend_runs_and_computes_nothing():
    shape = jax.ShapeDtypeStruct((1, 5, 2, 3), jnp.float32)
    explanation = pallas_kernels.explain("null_attention", shape, shape, shape, window=2)
    assert explanation.implementation == next(name for name, reason in explanation.reasons.items() if not reason)
    assert tuple(explanation.reasons) == pallas_kernels.implementations("null_attention")
    assert f"{explanation.implementation}: runs" in str(explanation) and "reference: could serve" in str(explanation)
    with pytest.raises(ValueError, match="window: must be None or a whole number"):
        pallas_kernels.explain("null_attention", shape, shape, shape, window=-2)


def test_explain_gives_the_reasons_of_those_that_cannot():
    def operator(x, *, implementation):
        return dispatch("operator", TABLE, implementation)(x)

    explanation = explain_call(operator, TABLE, (1,), {})
    assert explanation.implementation == "slow" and explanation.reasons == {
        "fast": "needs another device",
        "slow": "",
        "plain": "",
    }
    assert "fast: needs another device" in str(explanation) and "slow: runs" in str(explanation)


@pytest.mark.parametrize("size, padded", [(80, {"mosaic_gpu": 96, "mosaic_tpu": 128}), (128, {})])
def test_explain_says_that_heads_are_padded(size, padded):
    shape, remarks = jax.ShapeDtypeStruct((1, 16, 2, size), jnp.bfloat16), {}
    for kind, platform in (("NVIDIA H100 80GB HBM3", "gpu"), ("TPU v5", "tpu")):
        device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            explanation = pallas_kernels.explain("null_attention", shape, shape, shape, logit_softcap=3.0)
        remarks |= explanation.remarks
        for name, remark in explanation.remarks.items():
            assert f"{name}: runs, {remark}" in str(explanation)
    if jax.__version_info__ < (0, 11, 2):
        padded.pop("mosaic_gpu", None)
    assert remarks == {name: f"heads of 80 are padded to {to}, and cost as much" for name, to in padded.items()}


def test_the_target_is_the_device_of_the_mesh_in_whose_context_a_call_is_traced():
    assert target_device().platform == jax.default_backend()
    hopper = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=hopper)):
        assert target_device() == ("gpu", "NVIDIA H100 80GB HBM3")
