"""GGUF files against folders of the same weights: names, order of rows, types, rotary factors, tokenizer."""

import itertools
import json
import math
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from pretrained import tiny
from pretrained.gguf_files import SIZES, write_gguf

from oasis_jax.errors import UserError
from oasis_jax.model.rotary import rotary_angles
from oasis_jax.pretrained import load_pretrained


def check_equal(one, other) -> None:
    leaves, others = (jax.tree_util.tree_leaves_with_path(x.params) for x in (one, other))
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, a), (_, b) in zip(leaves, others):
        assert np.array_equal(a, b), path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_is_the_folder_of_the_same_weights(tmp_path, family, tied):
    config = tiny.CONFIG | {"model_type": family, "tie_word_embeddings": tied, "rope_theta": 12345.0}
    values = tiny.tensors(config)
    found = load_pretrained(write_gguf(tmp_path / "model.gguf", config, values))
    folder = load_pretrained(tiny.write(tmp_path / "folder", config, values))
    assert found.config == folder.config
    assert found.card["family"] == family
    check_equal(found, folder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_of_tensors(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    config = tiny.CONFIG | SIZES
    values = tiny.tensors(config)
    read = {
        name: gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).astype(np.float32) if x.ndim > 1 else x
        for name, x in values.items()
    }
    assert not np.array_equal(read["lm_head.weight"], values["lm_head.weight"])
    found = load_pretrained(write_gguf(tmp_path / "model.gguf", config, values, kind))
    check_equal(found, load_pretrained(tiny.write(tmp_path / "folder", config, read)))


# Where the float16 factors lie in a block of 256 values; the other bytes are whole numbers of a few bits, any of which
# will do.
FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}


def random_blocks(random, shape: tuple[int, int], kind: str) -> np.ndarray:
    """The bytes of a matrix in a type that the package reads and does not write."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (shape[0], shape[1] // values, size), dtype=np.uint8)
    for place in FACTORS[kind]:
        factors = random.normal(0, 1e-3, blocks.shape[:2]).astype("<f2")
        blocks[..., place : place + 2] = factors[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("kind, family", [*((kind, "llama") for kind in FACTORS), ("Q4_K and Q6_K", "qwen3")])
def test_types_in_blocks_of_256(tmp_path, kind, family):
    """A llama file has the rows of queries and keys in pairs, whatever their type; a qwen3 file has them in halves."""
    config = tiny.CONFIG | dict(model_type=family, hidden_size=256, intermediate_size=768, num_hidden_layers=1)
    config |= dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64, vocab_size=37)
    random, kinds = np.random.default_rng(0), itertools.cycle(kind.split(" and "))
    values, raw, expected = tiny.tensors(config), {}, {}
    for name, x in values.items():
        if x.ndim == 1:
            expected[name] = x
            continue
        one = next(kinds)
        rows = random_blocks(random, x.shape, one)
        raw[name] = (rows, gguf.GGMLQuantizationType[one])
        expected[name] = gguf.quants.dequantize(*raw[name]).astype(np.float32)
        assert np.isfinite(expected[name]).all() and len(np.unique(expected[name])) > 100
    found = load_pretrained(write_gguf(tmp_path / "model.gguf", config, values | raw))
    check_equal(found, load_pretrained(tiny.write(tmp_path / "folder", config, expected)))


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"])
def test_a_type_that_cannot_be_read_is_named(tmp_path, kind):
    """Q8_1 and Q8_K are what products are computed in; no file of a model has them."""
    name, number = "model.layers.1.mlp.up_proj.weight", gguf.GGMLQuantizationType[kind]
    config = tiny.CONFIG | dict(intermediate_size=512, hidden_size=256)
    values, size = gguf.GGML_QUANT_SIZES[number]
    rows = np.zeros((512, 256 // values * size), np.uint8)
    path = write_gguf(tmp_path / "model.gguf", config, tiny.tensors(config) | {name: (rows, number)})
    refused(path, name, f"cannot read type {kind}")


def test_rotary_factors_of_a_file_are_llama_3s_scaling(tmp_path):
    config = tiny.CONFIG | {"head_dim": 32, "rope_theta": 1e4}
    old, factor, low, high = 200, 8.0, 1.0, 4.0
    inverse = 1e4 ** (-np.arange(16) / 16)
    wave, factors = 2 * math.pi / inverse, []
    for length in wave:
        smooth = (old / length - low) / (high - low)
        factors.append(factor if length > old / low else 1.0 if length < old / high else factor_of(smooth, factor))
    assert 1.0 in factors and factor in factors and len(set(factors)) > 2

    def more(writer):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    values = tiny.tensors(config)
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling["original_max_position_embeddings"] = old
    found = load_pretrained(write_gguf(tmp_path / "model.gguf", config, values, more=more))
    folder = load_pretrained(tiny.write(tmp_path / "folder", config, values, rope_scaling=scaling))
    check_equal(found, folder)
    positions = jnp.arange(3, 900, 71)[None]
    expected = np.array(positions)[0][:, None] * (inverse / factors)
    for model in (found, folder):
        cos, sin = rotary_angles(model.config, positions, jnp.float32)
        np.testing.assert_allclose(cos[0, :, 0], np.cos(expected), atol=1e-4)
        np.testing.assert_allclose(sin[0, :, 0], np.sin(expected), atol=1e-4)


def factor_of(smooth: float, factor: float) -> float:
    return 1 / ((1 - smooth) / factor + smooth)


def test_scalings_by_name(tmp_path):
    config = tiny.CONFIG | {"model_type": "qwen3"}

    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    values = tiny.tensors(config)
    found = load_pretrained(write_gguf(tmp_path / "model.gguf", config, values, more=more))
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    folder = load_pretrained(tiny.write(tmp_path / "folder", config, values, rope_scaling=scaling))
    assert found.config == folder.config and found.config.rope_scaling.original_length == 32


def refused(path: pathlib.Path, *parts: str) -> None:
    with pytest.raises(UserError) as found:
        load_pretrained(path)
    message = str(found.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_files_that_are_damaged(tmp_path):
    config = tiny.CONFIG
    whole = write_gguf(tmp_path / "whole.gguf", config, tiny.tensors()).read_bytes()
    path = tmp_path / "model.gguf"
    for kept in (0, 3, 20, 200, 1500, len(whole) // 2, len(whole) - 500):
        path.write_bytes(whole[:kept])
        refused(path, "model.gguf")
    path.write_bytes(b"GGML" + whole[4:])
    refused(path, "model.gguf", "GGUF")


def test_files_that_cannot_be_read(tmp_path):
    path, values = tmp_path / "model.gguf", tiny.tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    write_gguf(path, tiny.CONFIG | {"model_type": "gemma3"}, values)
    refused(path, "gemma3", "llama", "qwen3")
    write_gguf(path, tiny.CONFIG, {k: v for k, v in values.items() if k != "model.embed_tokens.weight"})
    refused(path, "token_embd.weight", "missing")
    write_gguf(path, tiny.CONFIG, values, more=lambda writer: writer.add_logit_scale(0.5))
    refused(path, "llama.logit_scale=0.5")
    write_gguf(path, tiny.CONFIG | {"hidden_size": 48}, values)
    refused(path, "embed_tokens", "(211, 24)", "(211, 48)")
    bad = values | {name: np.full((40, 24), np.nan, np.float32)}
    refused(write_gguf(path, tiny.CONFIG, bad), name, "not finite")
    more = values | {"model.layers.2.mlp.up_proj.weight": np.ones((40, 24), np.float32)}
    refused(write_gguf(path, tiny.CONFIG, more), "model.layers.2.mlp.up_proj.weight")


def test_a_file_without_a_size(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.ones((211, 24), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "model.gguf", "hidden_size")


TEXT = "Über 1234 words, isn't it?\n\n  def f(x):\n\treturn x ** 2  # 日本語 🙂"


@pytest.fixture(scope="module")
def byte_pairs() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    library.train_from_iterator([TEXT * 5], trainer)
    return library


def tokenizer_fields(library: tokenizers.Tokenizer, **leave_out):
    vocabulary = library.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(library.to_str())["model"]["merges"]

    def more(writer):
        writer.add_tokenizer_model(leave_out.get("model", "gpt2"))
        writer.add_tokenizer_pre(leave_out.get("pre", "gpt-2"))
        writer.add_token_list(tokens)
        writer.add_token_types([3] + [1] * (len(tokens) - 1))
        if "merges" not in leave_out:
            writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_eos_token_id(0)

    return more


def test_the_tokenizer_of_a_file(tmp_path, byte_pairs):
    config = tiny.CONFIG | {"vocab_size": byte_pairs.get_vocab_size()}
    path = write_gguf(tmp_path / "model.gguf", config, tiny.tensors(config), more=tokenizer_fields(byte_pairs))
    found = load_pretrained(path)
    assert found.tokenizer.encode(TEXT).tolist() == byte_pairs.encode(TEXT).ids
    assert found.tokenizer.decode(found.tokenizer.encode(TEXT)).decode() == TEXT
    assert found.tokenizer.separator_id == 0 and found.begin_token is None


@pytest.mark.parametrize("changes", [dict(model="wordpiece"), dict(pre="tekken"), dict(merges=None)], ids=str)
def test_a_tokenizer_that_cannot_be_made(tmp_path, byte_pairs, changes):
    config = tiny.CONFIG | {"vocab_size": byte_pairs.get_vocab_size()}
    more = tokenizer_fields(byte_pairs, **changes)
    refused(write_gguf(tmp_path / "model.gguf", config, tiny.tensors(config), more=more), "tokenizer")


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, byte_pairs):
    path = write_gguf(tmp_path / "model.gguf", tiny.CONFIG, tiny.tensors(), more=tokenizer_fields(byte_pairs))
    refused(path, "300", "211")


def best_merges(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm: of all neighbours whose union is a token, the best-scored one is joined, first the
    leftmost; what no token covers is spelled in bytes.
    """
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not unions:
            break
        index = -max(unions)[1]
        parts[index : index + 2] = ["".join(parts[index : index + 2])]
    return [x for part in parts for x in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]


def test_a_tokenizer_of_scores(tmp_path):
    random = np.random.default_rng(0)
    words = ["the", "then", "he", "hen", "▁the", "▁hen", "en", "th", "▁t", "▁h", "▁", "in", "ing", "thing", "▁▁"]
    letters = sorted(set("".join(words)) - {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys([*letters, *words])]
    scores = [0.0] * 259 + random.permutation(-np.arange(len(tokens) - 259.0)).tolist()

    def more(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    config = tiny.CONFIG | {"vocab_size": len(tokens)}
    model = load_pretrained(write_gguf(tmp_path / "model.gguf", config, tiny.tensors(config), more=more))
    assert model.begin_token == 1 and model.tokenizer.separator_id == 2
    known = dict(zip(tokens[259:], scores[259:]))
    for _ in range(200):
        text = "".join(random.choice([*letters, " ", "é", "\n"], size=random.integers(1, 30)))
        ids = model.tokenizer.encode(text)
        assert [tokens[i] for i in ids] == best_merges(text, known), text
