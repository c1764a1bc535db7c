"""Rotation of the residual stream: an orthogonal matrix spreads channels that are large in every token over all of them
and changes nothing in float (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456).

x -> x R for the stream: gains of norms go into the next linear maps first, so that RMSNorm commutes with R; what reads
the stream becomes R^T W, what writes it W R. A head of its own replaces a tied one. Two more rotations act inside a
layer: values, head by head, undone by the output projection, and the hidden activations of the MLP, which needs one
Hadamard transform at run time (`mlp_rotation`) that the down projection undoes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.model.head import head_kernel
from oasis_jax.model.mlp import hadamard
from oasis_jax.pretrained.load import Pretrained

LARGEST_BLOCK = 512  # of the MLP's Hadamard transform


def rotate(model: Pretrained, seed: int = 0, *, online: bool = True) -> Pretrained:
    """The model with a rotated residual stream and, inside every layer, rotated values.

    Args:
      model: with RMSNorm or no norms.
      seed: of the rotation.
      online: rotates the MLP's hidden activations too, which costs one block-wise Hadamard transform at run time; such
        a model has no standard form to export.

    Raises:
      UserError: a model that does not commute with a rotation, with the reason.
    """
    check_rotation(model.config)
    config = dataclasses.replace(model.config, tied_head=False)
    if online:
        config = dataclasses.replace(config, mlp_rotation=block_of(config.mlp_size))
    rotation = jnp.asarray(random_rotation(config.width, seed), jnp.float32)
    heads = jnp.asarray(random_rotation(config.head_size, seed + 1), jnp.float32)
    turned = jax.jit(lambda params: _rotated(params, model.config, config, rotation, heads))(model.params)
    kind = "stream, values and MLP" if online else "stream and values"
    return model.changed(config, turned, f"rotated: {kind}, seed {seed}")


def check_rotation(config: ModelConfig) -> None:
    """Raises UserError where a model does not commute with a rotation of its stream."""
    if config.norm not in ("rmsnorm", "none"):
        raise UserError(f"rotate: norm={config.norm} does not commute with a rotation; only rmsnorm and none do")
    if config.residual_clip:
        raise UserError(f"rotate: residual_clip={config.residual_clip} clips channels, which a rotation mixes")
    if config.mlp_rotation:
        raise UserError("rotate: this model is rotated already")


def block_of(size: int) -> int:
    """The largest power of two, up to `LARGEST_BLOCK`, that divides a size."""
    return min(size & -size, LARGEST_BLOCK)


def random_rotation(size: int, seed: int) -> Float[np.ndarray, "D D"]:
    """A seeded orthogonal matrix in float64: a Hadamard matrix with random signs where the size is a power of two, else
    the product of one with a random orthogonal matrix, over blocks and within them.
    """
    generator = np.random.default_rng(seed)
    power = size & -size
    normal = generator.standard_normal((size // power, size // power))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diag(r))  # uniform over all orthogonal matrices
    signs = generator.choice([-1.0, 1.0], size)
    return signs[:, None] * np.kron(q, np.asarray(hadamard(power), np.float64) if power > 1 else np.ones((1, 1)))


def _product(equation: str, *operands: Array) -> Array:
    """In float32 at full precision; the result has the type of the first operand."""
    wide = [x.astype(jnp.float32) for x in operands]
    return jnp.einsum(equation, *wide, precision=jax.lax.Precision.HIGHEST).astype(operands[0].dtype)


def _rotated(params: Mapping[str, Any], old: ModelConfig, new: ModelConfig, rotation: Array, heads: Array) -> dict:
    embedding = {name: _product("VD,DE->VE", x, rotation) for name, x in params["embedding"].items()}
    kernel = head_kernel(params)
    if old.norm != "none":
        kernel = kernel * params["final_norm"]["scale"][:, None]
    found = {"embedding": embedding, "head": {"kernel": _product("DV,DE->EV", kernel, rotation)}}
    found["layers"] = _rotated_layers(params["layers"], old, new, rotation, heads)
    if "routers" in params:
        found["routers"] = _rotated_routers(params["routers"], rotation)
    if "final_norm" in params:
        found["final_norm"] = _ones(params["final_norm"])
    return found


def _ones(norm: Mapping[str, Array]) -> dict[str, Array]:
    return {name: jnp.ones_like(x) for name, x in norm.items()}


def _rotated_layers(layers: Mapping[str, Any], old: ModelConfig, new: ModelConfig, rotation, heads) -> dict:
    """Arrays [L, ...]: readers take the gain of their norm and turn their first axis, writers turn their last."""

    def reads(x: Array, norm: str) -> Array:
        if old.norm != "none":
            gain = layers[norm]["scale"]
            x = x * gain.reshape(*gain.shape, *(1,) * (x.ndim - 2))
        return _product("LD...,DE->LE...", x, rotation)

    def writes(x: Array) -> Array:
        return _product("L...D,DE->L...E", x, rotation)

    attention, mlp = dict(layers["attention"]), dict(layers["mlp"])
    for name in ("query", "key", "value", "gate", "null_projection"):
        if name in attention:
            attention[name] = reads(attention[name], "attention_norm")
    for name in ("output", "output_bias"):
        if name in attention:
            attention[name] = writes(attention[name])
    if old.gate != "elementwise":  # a gate of single channels sees values as they are
        for name in ("value", "value_bias", "null_value"):
            if name in attention:
                attention[name] = _product("...H,HI->...I", attention[name], heads)
        attention["output"] = _product("LNHD,HI->LNID", attention["output"], heads)
    for name in ("gate", "up"):
        if name in mlp:
            mlp[name] = reads(mlp[name], "mlp_norm")
    for name in ("down", "down_bias"):
        if name in mlp:
            mlp[name] = writes(mlp[name])
    if new.mlp_rotation:
        block = jnp.asarray(hadamard(new.mlp_rotation), jnp.float32)
        down = mlp["down"].reshape(mlp["down"].shape[0], -1, new.mlp_rotation, new.width)
        mlp["down"] = _product("LBFD,FG->LBGD", down, block).reshape(mlp["down"].shape)
    norms = {name: _ones(layers[name]) for name in ("attention_norm", "mlp_norm") if name in layers}
    return {**layers, **norms, "attention": attention, "mlp": mlp}


def _rotated_routers(routers: Mapping[str, Array], rotation: Array) -> dict[str, Array]:
    """Queries over depth see the stream as readers do; a static router's key gain goes into its query."""
    found = dict(routers)
    if "key_norm" not in routers and "key" not in routers:  # of router=qkv, or with uniform weights nothing at all
        return found | {name: _product("RD,DE->RE", x, rotation) for name, x in routers.items() if name == "query"}
    if "key_norm" in routers:
        found["query"] = _product("RD,DE->RE", routers["query"] * routers["key_norm"], rotation)
        found["key_norm"] = jnp.ones_like(routers["key_norm"])
        return found
    for name in ("query", "key"):
        found[name] = _product("RDC,DE->REC", routers[name], rotation)
    return found
