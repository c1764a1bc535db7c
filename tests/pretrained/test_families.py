"""What config.json files of published models say, and families of the same mathematics in other files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import tiny

from oasis_jax.config import LayerPattern
from oasis_jax.model.decoder import forward, parameter_specs
from oasis_jax.model.rotary import attention_factor
from oasis_jax.pretrained import load_pretrained
from oasis_jax.pretrained.families import FAMILIES, read_model_config
from oasis_jax.pretrained.mapping import file_shape, file_specs

# As published, with what every one of them carries; and how many parameters the model is known to have.
USUAL = dict(
    architectures=["ForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu",
    initializer_range=0.02, torch_dtype="bfloat16", transformers_version="4.45.0", use_cache=True,
)  # fmt: skip
PUBLISHED = {
    "Llama-3.2-1B": (1_235_814_400, USUAL | dict(
        model_type="llama", attention_bias=False, head_dim=64, hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32, num_hidden_layers=16,
        num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        vocab_size=128256, rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3"),
    )),
    "SmolLM2-135M": (134_515_008, USUAL | dict(
        model_type="llama", attention_bias=False, hidden_size=576, intermediate_size=1536, is_llama_config=True,
        max_position_embeddings=8192, num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
        pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
        tie_word_embeddings=True, vocab_size=49152,
    )),
    "Mistral-7B-v0.1": (7_241_732_096, USUAL | dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, vocab_size=32000,
    )),
    "Qwen2.5-0.5B": (494_032_768, USUAL | dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
        max_window_layers=24, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6,
        rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, use_mrope=False,
        use_sliding_window=False, vocab_size=151936,
    )),
    "Qwen3-0.6B": (596_049_920, USUAL | dict(
        model_type="qwen3", attention_bias=False, head_dim=128, hidden_size=1024, intermediate_size=3072,
        max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16, num_hidden_layers=28,
        num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
    )),
    "Phi-4-mini": (3_836_021_760, USUAL | dict(
        model_type="phi3", attention_bias=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        embd_pdrop=0.0, full_attn_mod=1, hidden_size=3072, intermediate_size=8192, interpolate_factor=1,
        lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=24,
        num_hidden_layers=32, num_key_value_heads=8, original_max_position_embeddings=4096, pad_token_id=199999,
        partial_rotary_factor=0.75, resid_pdrop=0.0, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144,
        rope_scaling=dict(short_factor=[1.0] * 48, long_factor=[1.5] * 48, type="longrope"),
        tie_word_embeddings=True, vocab_size=200064,
    )),
    "opt-125m": (125_239_296, dict(
        model_type="opt", _remove_final_layer_norm=False, activation_dropout=0.0, activation_function="relu",
        do_layer_norm_before=True, dropout=0.1, ffn_dim=3072, hidden_size=768, init_std=0.02, layerdrop=0.0,
        max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12, pad_token_id=1, prefix="</s>",
        vocab_size=50272, word_embed_proj_dim=768,
    )),
    "gpt2": (124_439_808, dict(
        model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1, layer_norm_epsilon=1e-5,
        n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=50257,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_understood_to_the_last_parameter(name):
    count, keys = PUBLISHED[name]
    config = read_model_config(keys, name)
    specs, total = parameter_specs(config), 0
    for entry in FAMILIES[keys["model_type"]].tensors(config):
        shape = file_shape(entry, file_specs(entry, specs, config.vocab_size))
        total += int(np.prod(shape)) * (config.num_layers if entry.of_layers else 1)
    assert total == count


def test_rotary_positions_of_phi_4_mini():
    config = read_model_config(PUBLISHED["Phi-4-mini"][1], "here")
    assert (config.rotary_size, config.head_size, config.rope_scaling.original_length) == (96, 128, 4096)
    assert attention_factor(config.rope_scaling) == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)


def test_windows():
    """Null, absent and unused are three things."""

    def window(**changes):
        config = read_model_config(tiny.CONFIG | {"num_hidden_layers": 4} | changes, "here")
        return [config.layer(i).window for i in range(4)]

    assert window(model_type="mistral", num_key_value_heads=3) == [4096] * 4
    assert window(model_type="mistral", sliding_window=None) == [0] * 4
    assert window(model_type="mistral", sliding_window=7) == [7] * 4
    for family in ("qwen2", "qwen3"):
        assert window(model_type=family, sliding_window=7, max_window_layers=1) == [0] * 4
        assert window(model_type=family, sliding_window=7, use_sliding_window=True) == [0] * 4
        used = dict(model_type=family, sliding_window=7, use_sliding_window=True)
        assert window(**used, max_window_layers=1) == [0, 7, 7, 7]
        assert window(**used, layer_types=["sliding_attention", "full_attention"] * 2) == [7, 0, 7, 0]
        assert window(model_type=family, use_sliding_window=True, max_window_layers=0) == [4096] * 4


def test_what_granite_says_of_its_layers():
    keys = tiny.CONFIG | {
        "model_type": "granite_swa",
        "num_hidden_layers": 8,
        "layer_rope_theta": [0, 1e4, 2e4, 1e4] * 2,
    }
    keys |= {"embedding_multiplier": 12, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22}
    config = read_model_config(keys | {"logits_scaling": 8}, "here")
    assert config.layer_pattern == (
        LayerPattern(window=0, rope_theta=0.0),
        LayerPattern(window=128, rope_theta=1e4),
        LayerPattern(window=128, rope_theta=2e4),
        LayerPattern(window=128, rope_theta=1e4),
    )
    assert (config.wiring, config.normalizer, config.score_scale) == ("residual", "learned_sink", 0.0078125)
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_multiplier) == (12, 0.22, 0.125)


def test_old_names_of_longrope_mean_it_in_phi_3_alone():
    lists = dict(short_factor=[1.0, 2, 3], long_factor=[2.0, 3, 4])
    keys = tiny.CONFIG | dict(model_type="phi3", head_dim=8, partial_rotary_factor=0.75, max_position_embeddings=8192)
    found = [
        read_model_config(keys | {"rope_scaling": {"type": kind} | lists}, "x") for kind in ("longrope", "su", "yarn")
    ]
    assert found[0] == found[1] == found[2] and found[0].rope_scaling.original_length == 4096


def logits_of(model, ids) -> np.ndarray:
    return np.asarray(jax.jit(forward, static_argnums=1)(model.params, model.config, ids)[0])


def test_phi_3_is_a_llama_in_fewer_tensors(tmp_path):
    values = tiny.tensors()
    llama = load_pretrained(tiny.write(tmp_path / "llama", values=values))
    for layer in range(2):
        name = f"model.layers.{layer}."
        parts = [values.pop(f"{name}self_attn.{x}_proj.weight") for x in "qkv"]
        values[f"{name}self_attn.qkv_proj.weight"] = np.concatenate(parts)
        parts = [values.pop(f"{name}mlp.{x}_proj.weight") for x in ("gate", "up")]
        values[f"{name}mlp.gate_up_proj.weight"] = np.concatenate(parts)
    phi3 = load_pretrained(tiny.write(tmp_path / "phi3", values=values, model_type="phi3"))
    assert phi3.config == llama.config
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, phi3.params, llama.params)))


def test_gpt_2_is_an_opt_with_other_names_and_matrices(tmp_path):
    """The same weights in the files of both; GPT-2's as the hub has them, without a prefix and with masks."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    table, positions = draw(211, 24), draw(16, 24)
    opt = {"embed_tokens.weight": table, "embed_positions.weight": np.concatenate([draw(2, 24), positions])}
    gpt2 = {"wte.weight": table, "wpe.weight": positions}

    def put(theirs: str, ours: str, *shape: int) -> None:
        for kind, own in (("weight", shape), ("bias", shape[-1:])):
            value = draw(*own)
            gpt2[f"{ours}.{kind}"], opt[f"{theirs}.{kind}"] = value, value.T.copy()

    put("final_layer_norm", "ln_f", 24)
    for layer in range(2):
        theirs, ours = f"layers.{layer}.", f"h.{layer}."
        put(f"{theirs}self_attn_layer_norm", f"{ours}ln_1", 24)
        put(f"{theirs}final_layer_norm", f"{ours}ln_2", 24)
        put(f"{theirs}self_attn.out_proj", f"{ours}attn.c_proj", 24, 24)
        put(f"{theirs}fc1", f"{ours}mlp.c_fc", 24, 40)
        put(f"{theirs}fc2", f"{ours}mlp.c_proj", 40, 24)
        weights, biases = [draw(24, 24) for _ in "qkv"], [draw(24) for _ in "qkv"]
        gpt2 |= {
            f"{ours}attn.c_attn.weight": np.concatenate(weights, 1),
            f"{ours}attn.c_attn.bias": np.concatenate(biases),
        }
        gpt2 |= {f"{ours}attn.bias": np.tril(draw(1, 1, 16, 16)), f"{ours}attn.masked_bias": np.array(-1e4)}
        for name, weight, bias in zip("qkv", weights, biases):
            opt |= {
                f"{theirs}self_attn.{name}_proj.weight": weight.T.copy(),
                f"{theirs}self_attn.{name}_proj.bias": bias,
            }
    sizes = dict(vocab_size=211, activation_function="gelu")
    keys = dict(n_embd=24, n_inner=40, n_layer=2, n_head=3, n_positions=16, model_type="gpt2") | sizes
    first = load_pretrained(tiny.write(tmp_path / "gpt2", keys, gpt2))
    keys = dict(hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=16)
    opt = {f"decoder.{name}": value for name, value in opt.items()}
    second = load_pretrained(tiny.write(tmp_path / "opt", keys | sizes | dict(model_type="opt"), opt))
    ids = jnp.arange(32).reshape(2, 16) * 13 % 211
    np.testing.assert_allclose(logits_of(first, ids), logits_of(second, ids), rtol=1e-5, atol=1e-4)


def test_sinks_of_granite_take_mass_from_every_head(tmp_path):
    keys = tiny.CONFIG | {"model_type": "granite_swa", "attention_multiplier": 0.001}
    values = tiny.tensors(keys)
    for layer in range(2):
        values[f"model.layers.{layer}.self_attn.sinks"] = np.array([-1e4, 0.0, 1e4], np.float32) * (layer + 1)
    model = load_pretrained(tiny.write(tmp_path, keys, values))
    _, statistics = jax.jit(forward, static_argnums=1)(model.params, model.config, jnp.arange(9)[None])
    for layer in statistics.attention:
        low, middle, high = np.asarray(layer.null_mass)[0]
        assert (low == 0).all() and (high == 1).all() and (middle > 0).all() and (middle < 1).all()


@pytest.mark.parametrize(
    "scaling",
    [
        dict(rope_type="linear", factor=2.0),
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
        | dict(original_max_position_embeddings=32),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False, beta_fast=20),
        dict(rope_type="default"),
    ],
    ids=str,
)
def test_old_and_new_spelling_of_rotary_positions(scaling):
    old = {name: value for name, value in scaling.items() if name != "rope_type"} | {"type": scaling["rope_type"]}
    spellings = [
        dict(rope_parameters=scaling | {"rope_theta": 5e5}),
        dict(rope_scaling=scaling, rope_theta=5e5),
        dict(rope_scaling=old, rope_theta=500_000),
        dict(rope_scaling=old | scaling, rope_parameters=scaling | {"rope_theta": 5e5}),
    ]
    first, *others = [read_model_config(tiny.CONFIG | spelling, "here") for spelling in spellings]
    assert first.rope_theta == 5e5 and all(other == first for other in others)
