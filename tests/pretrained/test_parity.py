"""Random checkpoints of odd sizes, saved by transformers: its logits and ours at 600 tokens, in float32.

Odd sizes, gains, biases and lengths beyond the original one are the point: a partial-rotary bug, for instance, does
not show in short texts. Run by `make test-parity`.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytest.importorskip("torch", reason="torch is not installed; make test-parity installs it")
transformers = pytest.importorskip("transformers", reason="transformers is missing; make test-parity installs it")

from pretrained.against_transformers import compare, first_departure, ours, random_checkpoint, theirs  # noqa: E402

from oasis_jax.pretrained import load_pretrained  # noqa: E402
from oasis_jax.pretrained.families import FAMILIES, read_model_config  # noqa: E402

LENGTH, VOCAB, TOLERANCE = 600, 211, 1e-4
SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=3e-4, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
HEAD = dict(head_dim=10)  # not width / heads
THETA = dict(rope_theta=12345.0)
LLAMA3 = THETA | dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
)
YARN = THETA | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=100)
FACTORS = dict(
    short_factor=[1.0, 1.3, 1.1, 2.0, 2.5, 1.7], long_factor=[1.2, 3.0, 5.5, 8.0, 4.0, 9.0],
    original_max_position_embeddings=256,
)  # fmt: skip
LONGROPE = THETA | dict(rope_type="longrope") | FACTORS
PARTIAL = dict(partial_rotary_factor=0.75)
PHI3 = SIZES | dict(num_attention_heads=3, num_key_value_heads=1)  # heads of 16, of which 12 turn
WINDOWS = dict(use_sliding_window=True, sliding_window=37)
OPT = dict(
    vocab_size=VOCAB, hidden_size=48, ffn_dim=88, num_hidden_layers=3, num_attention_heads=6,
    max_position_embeddings=700, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
GPT2 = dict(
    vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=6, n_positions=640, layer_norm_epsilon=3e-4, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
GRANITE = SIZES | dict(
    num_hidden_layers=5, sliding_window=33, embedding_multiplier=2.5, attention_multiplier=0.21,
    residual_multiplier=0.4, logits_scaling=3.0,
)  # fmt: skip

CASES = {
    "llama": ("llama", SIZES | HEAD | dict(rope_parameters=THETA)),
    "llama_tied": ("llama", SIZES | dict(tie_word_embeddings=True)),
    "llama_biases": ("llama", SIZES | HEAD | dict(attention_bias=True, mlp_bias=True)),
    "llama_3": ("llama", SIZES | dict(head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama_linear": ("llama", SIZES | HEAD | dict(rope_parameters=THETA | dict(rope_type="linear", factor=3.5))),
    "llama_yarn": ("llama", SIZES | dict(head_dim=16, rope_parameters=YARN)),
    "llama_yarn_bounds": (
        "llama",
        SIZES
        | dict(head_dim=16)
        | dict(rope_parameters=YARN | dict(truncate=False, beta_fast=9.0, beta_slow=2.0, attention_factor=1.3)),
    ),
    "llama_longrope": ("llama", SIZES | dict(head_dim=12, rope_parameters=LONGROPE | dict(factor=4.0))),
    "mistral": ("mistral", SIZES | HEAD | dict(sliding_window=37, rope_parameters=THETA)),
    "mistral_full": ("mistral", SIZES | HEAD | dict(sliding_window=None)),
    "qwen2": ("qwen2", SIZES | dict(rope_parameters=THETA)),
    "qwen2_windows": ("qwen2", SIZES | WINDOWS | dict(max_window_layers=1, tie_word_embeddings=True)),
    "qwen2_yarn": ("qwen2", SIZES | dict(rope_parameters=YARN)),
    "qwen3": ("qwen3", SIZES | HEAD | dict(tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e6))),
    "qwen3_windows": ("qwen3", SIZES | HEAD | WINDOWS | dict(max_window_layers=2, attention_bias=True)),
    "phi3": ("phi3", PHI3 | dict(original_max_position_embeddings=1024)),
    "phi3_partial": (
        "phi3",
        PHI3 | dict(rope_parameters=THETA | dict(rope_type="default") | PARTIAL, sliding_window=50),
    ),
    "phi3_longrope": (
        "phi3",
        PHI3
        | dict(rope_parameters=LONGROPE | PARTIAL, original_max_position_embeddings=256, tie_word_embeddings=True),
    ),
    "opt": ("opt", OPT),
    "opt_untied": ("opt", OPT | dict(tie_word_embeddings=False, activation_function="gelu")),
    "opt_no_biases": ("opt", OPT | dict(enable_bias=False)),
    "gpt2": ("gpt2", GPT2),
    "gpt2_other": (
        "gpt2",
        GPT2 | dict(n_inner=88, scale_attn_weights=False, activation_function="gelu", tie_word_embeddings=False),
    ),
    "granite_swa": (
        "granite_swa",
        GRANITE | dict(layer_rope_theta=[0, 1e4, 5e5, 0, 123.0], rope_parameters=dict(rope_theta=777.0)),
    ),
    "granite_swa_other": (
        "granite_swa",
        GRANITE
        | HEAD
        | dict(num_hidden_layers=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=THETA),
    ),
}  # fmt: skip


def tokens(rows: int = 1, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(rows).integers(VOCAB, size=(rows, length))


def check(label: str, model, folder, ids, real=None, mask=None, positions=None, their_positions=None) -> None:
    real = np.ones(ids.shape, bool) if real is None else real
    found = compare(
        ours(load_pretrained(folder), ids, mask, positions), theirs(model, ids, mask, their_positions), ids, real,
        TOLERANCE,
    )  # fmt: skip
    print(f"{label}: logits {found['logits']:.1e}, perplexity {found['perplexity']:.1e}")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_perplexity(tmp_path, case):
    family, keys = CASES[case]
    check(case, random_checkpoint(tmp_path, family, **keys), tmp_path, tokens())


# OPT takes its positions from the mask itself.
@pytest.mark.parametrize(
    "case", ["llama_3", "mistral", "qwen2_windows", "qwen3", "phi3_longrope", "opt", "gpt2", "granite_swa"]
)
def test_a_left_padded_batch(tmp_path, case):
    family, keys = CASES[case]
    model, ids = random_checkpoint(tmp_path, family, **keys), tokens(3)
    mask = (np.arange(LENGTH) >= LENGTH - np.array([[LENGTH], [437], [51]])).astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    check(
        f"{case}, padded", model, tmp_path, ids, mask.astype(bool), mask, positions,
        None if family == "opt" else positions,
    )  # fmt: skip


@pytest.mark.parametrize("length", [40, 256, 257])
def test_longrope_on_both_sides_of_the_original_length(tmp_path, length):
    family, keys = CASES["phi3_longrope"]
    check(f"phi3_longrope, {length}", random_checkpoint(tmp_path, family, **keys), tmp_path, tokens(2, length))


def test_gpt2_as_the_hub_has_it(tmp_path):
    """No `transformer.` in front of the names, and masks among the tensors."""
    model = random_checkpoint(tmp_path, *CASES["gpt2"][:1], **CASES["gpt2"][1])
    values = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    values = {name.removeprefix("transformer."): value for name, value in values.items()}
    for layer in range(3):
        values[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 640, 640), np.float32))
        values[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    check("gpt2, hub", model, tmp_path, tokens())


def test_phi3_under_its_older_names(tmp_path):
    """`su` with everything at the top level, as files of 2024 have it."""
    family, keys = CASES["phi3_longrope"]
    model = random_checkpoint(tmp_path, family, **keys)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"type": "su"} | {name: config["rope_parameters"][name] for name in ("short_factor", "long_factor")}
    theta, partial = (config["rope_parameters"][name] for name in ("rope_theta", "partial_rotary_factor"))
    del config["rope_parameters"]
    config |= {"rope_scaling": old, "rope_theta": theta, "partial_rotary_factor": partial, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check("phi3, su", model, tmp_path, tokens())


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_what_a_config_leaves_out(family):
    """A file with nothing but sizes is read as transformers reads it."""
    sizes = {
        "opt": dict(vocab_size=VOCAB, hidden_size=48, ffn_dim=88, num_hidden_layers=2, num_attention_heads=6),
        "gpt2": dict(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=6),
    }.get(
        family,
        dict(vocab_size=VOCAB, hidden_size=128, intermediate_size=88, num_hidden_layers=2, num_attention_heads=32),
    )
    whole = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert len(whole) > len(sizes) + 8
    bare = read_model_config(sizes | {"model_type": family}, "bare")
    found = read_model_config(whole, "whole")
    assert bare.head_size == found.head_size and bare.key_heads == found.key_heads
    for name in ("head_dim", "num_kv_heads"):  # 0 and what it stands for
        object.__setattr__(bare, name, getattr(found, name))
    assert bare == found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("layers", "attention", "key_norm"), "layer 1: attention_output"),
        (("layers", "mlp_norm", "scale"), "layer 1: mlp_norm"),
        (("layers", "mlp", "down"), "layer 1: mlp_output"),
        (("embedding", "table"), "embedding"),
        (("final_norm", "scale"), "final_norm"),
    ],
)
def test_the_first_module_that_departs_is_named(tmp_path, change, named):
    """Which shows that the comparison sees what it is to see."""
    family, keys = CASES["qwen3"]
    other = theirs(random_checkpoint(tmp_path, family, **keys), tokens())
    model = load_pretrained(tmp_path)
    params = {group: dict(values) for group, values in model.params.items()}
    *path, last = change
    group = params
    for name in path:
        group[name] = dict(group[name])
        group = group[name]
    group[last] = group[last].at[1].multiply(1.01)
    one, real = ours(model.replace(params=params), tokens()), np.ones((1, LENGTH), bool)
    assert first_departure(one, other, real, TOLERANCE).startswith(named)
    with pytest.raises(AssertionError, match=named):
        compare(one, other, tokens(), real, TOLERANCE)
