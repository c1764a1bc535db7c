"""Checkpoints of OASIS' published code against numpy in float64, written from the definitions alone."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model import oracle
from pretrained import tiny
from sampling import sampled

from oasis_jax import Context
from oasis_jax.commands import export
from oasis_jax.commands.parser import run_main
from oasis_jax.config import ModelConfig
from oasis_jax.errors import UserError
from oasis_jax.pretrained import load_pretrained

T, D, HEADS, SIZE, LAYERS, SHORT = 11, 20, 3, 6, 3, 64  # SHORT: of a router's queries; a quarter of D would be less
KEYS = tiny.CONFIG | dict(
    hidden_size=D, intermediate_size=28, num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=SIZE,
    rms_norm_eps=1e-5, vocab_size=37,
)  # fmt: skip
SOFTMAX1 = dict(normalizer="softmax1", depth_normalizer="softmax1")


def checkpoint(family: str, coupled: bool, **changes: Any) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors of a random model under the reference's names, no parameter at its start."""
    config, random = KEYS | {"model_type": family} | changes, np.random.default_rng(7)
    values = tiny.tensors(config)
    for name, x in values.items():
        values[name] = 1 + 0.3 * x if x.ndim == 1 else x if "embed" in name else x * x.shape[1] ** -0.5
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        if family == "phi3":
            qkv = [values.pop(f"{at}self_attn.{x}_proj.weight") for x in "qkv"]
            values[f"{at}self_attn.qkv_proj.weight"] = np.concatenate(qkv)
            both = [values.pop(f"{at}mlp.{x}_proj.weight") for x in ("gate", "up")]
            values[f"{at}mlp.gate_up_proj.weight"] = np.concatenate(both)
        for router in ("attn_res_sa", "attn_res_mlp"):
            for x in "qk":
                values[f"{at}{router}.{x}_proj.weight"] = random.normal(0, D**-0.5, (SHORT, D)).astype(np.float32)
            values[f"{at}{router}.recency_bias"] = random.normal(1.0, 1.0, 1).astype(np.float32)
            if coupled:
                values[f"{at}{router}.oasis_beta_raw"] = random.normal(3.0, 3.0, 1).astype(np.float32)
    return config, values


def by_definition(values: dict[str, np.ndarray], family: str, tied: bool, ids: np.ndarray, **method: Any) -> np.ndarray:
    """Logits [B, T, V]."""

    def heads(rows):
        return rows.T.reshape(D, -1, SIZE)

    layers, routers = {}, {}
    for layer in range(LAYERS):
        own = {k.removeprefix(f"model.layers.{layer}."): x for k, x in values.items() if f"layers.{layer}." in k}
        if family == "phi3":
            q, k, v = np.split(own["self_attn.qkv_proj.weight"], [HEADS * SIZE, HEADS * SIZE + SIZE])
            gate, up = np.split(own["mlp.gate_up_proj.weight"], 2)
        else:
            q, k, v = (own[f"self_attn.{x}_proj.weight"] for x in "qkv")
            gate, up = (own[f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
        attention = dict(query=heads(q), key=heads(k), value=heads(v))
        attention["output"] = own["self_attn.o_proj.weight"].T.reshape(HEADS, SIZE, D)
        if family == "qwen3":
            attention |= dict(query_norm=own["self_attn.q_norm.weight"], key_norm=own["self_attn.k_norm.weight"])
        layers[layer] = dict(
            attention=attention,
            mlp=dict(gate=gate.T, up=up.T, down=own["mlp.down_proj.weight"].T),
            attention_norm=dict(scale=own["input_layernorm.weight"]),
            mlp_norm=dict(scale=own["post_attention_layernorm.weight"]),
        )
        for place, name in enumerate(("attn_res_sa", "attn_res_mlp")):
            routers[2 * layer + place] = dict(
                query=own[f"{name}.q_proj.weight"].T,
                key=own[f"{name}.k_proj.weight"].T,
                recency_bias=own[f"{name}.recency_bias"][0],
                beta_raw=own.get(f"{name}.oasis_beta_raw", [np.nan])[0],
            )
    params = dict(layers=layers, routers=routers, embedding=dict(table=values["model.embed_tokens.weight"]))
    params["final_norm"] = dict(scale=values["model.norm.weight"])
    if not tied:
        params["head"] = dict(kernel=values["lm_head.weight"].T)
    config = ModelConfig(
        preset="oasis", num_layers=LAYERS, width=D, num_heads=HEADS, num_kv_heads=1, head_dim=SIZE, mlp_dim=28,
        vocab_size=37, norm_epsilon=1e-5, qk_norm=family == "qwen3", tied_head=tied, **method,
    )  # fmt: skip
    return oracle.forward(params, config, ids)["logits"]


def logits(model, ids: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.decoder()(jnp.asarray(ids), Context())[0])


CASES = {
    "llama": ("llama", True, False, SOFTMAX1),
    "qwen3": ("qwen3", True, True, dict(normalizer="softmax1", depth_normalizer="softmax")),
    "phi3": (
        "phi3",
        True,
        False,
        dict(normalizer="clipped", clip_gamma=-0.02, clip_zeta=1.1, depth_normalizer="softmax1"),
    ),
    "baseline": ("llama", False, True, dict(normalizer="softmax", depth_normalizer="softmax")),
}


@pytest.mark.parametrize("case", sampled(CASES, ("llama", "baseline")))
def test_logits_are_those_of_the_definitions(tmp_path, case):
    family, coupled, tied, normalizers = CASES[case]
    config, values = checkpoint(family, coupled, tie_word_embeddings=tied)
    model = load_pretrained(tiny.write(tmp_path, config, values), normalizers=normalizers)
    assert (model.config.wiring, model.config.router, model.config.coupling) == ("cumulative", "projected", coupled)
    assert model.config.preset == {"llama": "oasis", "baseline": "attnres_cumulative"}.get(case, "oasis")
    ids = np.random.default_rng(1).integers(0, 37, (2, T))
    expected = by_definition(values, family, tied, ids, coupling=coupled, **normalizers)
    assert np.abs(logits(model, ids) - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_head_beside_a_tie_is_the_models_own(tmp_path):
    config, values = checkpoint("llama", coupled=True)
    found = load_pretrained(tiny.write(tmp_path, config, values, tie_word_embeddings=True), normalizers=SOFTMAX1)
    assert not found.config.tied_head
    np.testing.assert_array_equal(found.params["head"]["kernel"][:, :37], values["lm_head.weight"].T)


def test_an_export_says_what_the_checkpoint_does_not(tmp_path, capsys):
    config, values = checkpoint("llama", coupled=True)
    source, out = tiny.write(tmp_path / "in", config, values), tmp_path / "out"
    fields = [f"--set=model.{name}={value}" for name, value in SOFTMAX1.items()]
    with pytest.raises(SystemExit, match="0"):
        run_main(export.main, [str(source), "--out", str(out), *fields], "oasis_jax export")
    one, other = load_pretrained(source, normalizers=SOFTMAX1), load_pretrained(out)
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    with pytest.raises(SystemExit, match="2"):
        run_main(export.main, [str(source), "--out", str(out), "--set=model.width=24"], "oasis_jax export")
    assert "model.width cannot be set here; allowed: model.normalizer" in capsys.readouterr().err


def refused(folder: pathlib.Path, message: str, **normalizers: Any) -> None:
    with pytest.raises(UserError, match=message):
        load_pretrained(folder, normalizers=normalizers or None)


def test_what_is_not_said_or_not_known(tmp_path):
    config, values = checkpoint("llama", coupled=True)
    folder = tiny.write(tmp_path, config, values)
    refused(folder, r"'normalizer' must be one of softmax, softmax1, clipped, entmax15, sparsemax, not given")
    refused(folder, r"'depth_normalizer' must be one of softmax, softmax1, not given", normalizer="softmax1")
    refused(folder, r"'normalizer' must be one of .*, got 'learned_sink'", normalizer="learned_sink")
    refused(folder, r"normalizers: unknown name 'width'; allowed: normalizer, depth_norm", **SOFTMAX1, width=24)
    refused(tiny.write(tmp_path, config, values, model_type="mistral"), "known backbones: llama, qwen3, phi3")
    refused(tiny.write(tmp_path / "plain"), "has no depth routers", **SOFTMAX1)


def test_keys_missing_and_left_over_are_listed(tmp_path):
    config, values = checkpoint("qwen3", coupled=True)
    del values["model.layers.1.attn_res_mlp.recency_bias"], values["model.layers.2.attn_res_sa.oasis_beta_raw"]
    values["model.layers.0.attn_res_sa.q_proj.bias"] = np.zeros(SHORT, np.float32)
    wanted = (
        r"tensors 'model.layers.1.attn_res_mlp.recency_bias', 'model.layers.2.attn_res_sa.oasis_beta_raw' are missing; "
        r"tensor 'model.layers.0.attn_res_sa.q_proj.bias' is not of the model"
    )
    refused(tiny.write(tmp_path, config, values), wanted, **SOFTMAX1)


def test_a_router_of_another_size(tmp_path):
    config, values = checkpoint("llama", coupled=True)
    values["model.layers.0.attn_res_sa.k_proj.weight"] = np.zeros((D // 4, D), np.float32)
    refused(tiny.write(tmp_path, config, values), r"has shape \(5, 20\), its config says \(64, 20\)", **SOFTMAX1)
