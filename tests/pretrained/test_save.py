"""Models out again: what comes back is what was written, in the form that its readers expect."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from sampling import sampled

from oasis_jax import UNSHARDED, ModelConfig, UserError, load_pretrained
from oasis_jax.commands import export
from oasis_jax.commands.parser import run_main
from oasis_jax.config import Config
from oasis_jax.data.tokenizers import TOKENIZERS, LibraryTokenizer
from oasis_jax.model.decoder import initial_params, parameter_specs
from oasis_jax.pretrained import Pretrained, rotate, save, save_pretrained, transplant_sink
from oasis_jax.pretrained.families.llama import tensors
from oasis_jax.pretrained.mapping import file_shape, file_specs
from oasis_jax.training.load import LoadedRun

CONFIG = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5, "vocab_size": 13, "tie_word_embeddings": True,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16", "bos_token_id": 1,
}  # fmt: skip
MODEL = ModelConfig(
    preset="residual", width=24, mlp_dim=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, norm_epsilon=1e-5,
    vocab_size=13, context_length=64,
)  # fmt: skip


def write_llama(folder, **changes):
    """A random checkpoint as other libraries write it, in bfloat16, with a tokenizer that puts token 1 first."""
    folder.mkdir()
    random, found = np.random.default_rng(0), {}
    for entry in tensors(MODEL):
        shape = file_shape(entry, file_specs(entry, parameter_specs(MODEL), MODEL.vocab_size))
        for layer in range(MODEL.num_layers) if entry.of_layers else (0,):
            found[entry.name.format(layer=layer)] = random.standard_normal(shape).astype(jnp.bfloat16)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(13)}, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def llama(tmp_path):
    return write_llama(tmp_path / "llama")


def test_a_standard_model_comes_out_byte_for_byte(llama, tmp_path):
    model = load_pretrained(llama)
    assert model.begin_token == 1 and model.tokenizer.encode("w3 w4").tolist() == [3, 4]
    assert save_pretrained(model, tmp_path / "out") == "llama"
    for name in ("model.safetensors", "tokenizer.json"):
        first, second = (folder / name for folder in (llama, tmp_path / "out"))
        if name == "model.safetensors":
            assert first.read_bytes() == second.read_bytes()
        else:
            assert json.loads(first.read_text()) == json.loads(second.read_text())
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG


def test_a_rotated_model_keeps_its_family_with_a_head_of_its_own(llama, tmp_path):
    model = rotate(load_pretrained(llama), online=False)
    assert save_pretrained(model, tmp_path / "out", dtype="float32") == "llama"
    back = load_pretrained(tmp_path / "out")
    assert not back.config.tied_head and "lm_head.weight" in load_file(tmp_path / "out/model.safetensors")
    chex.assert_trees_all_equal(back.params, model.params)
    assert "rotated" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("changed", [transplant_sink, rotate, lambda model: rotate(transplant_sink(model, [1, 5]))])
def test_a_changed_model_comes_back_as_it_was(llama, tmp_path, changed):
    model = changed(load_pretrained(llama))
    assert save_pretrained(model, tmp_path / "out", dtype="float32") == "oasis"
    back = load_pretrained(tmp_path / "out")
    assert back.config == model.config and back.begin_token == model.begin_token
    assert back.tokenizer.identity == model.tokenizer.identity
    chex.assert_trees_all_equal(back.params, model.params)
    assert save_pretrained(back, tmp_path / "again", dtype="float32") == "oasis"


def test_large_models_are_cut_into_shards(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD", 3000)
    model = load_pretrained(llama)
    save_pretrained(model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    chex.assert_trees_all_equal(load_pretrained(tmp_path / "out").params, model.params)


def test_export_writes_what_it_was_asked_for(llama, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main(export.main, [str(llama), "--out", str(tmp_path / "out"), "--transplant", "begin"], "oasis_jax export")
    assert "model_type oasis" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "out").config.normalizer == "null_key_value"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "full"], "'full' is not empty"),
        (["--out", "out", "--dtype", "int8"], "'int8' cannot be written; allowed: float32, bfloat16, float16"),
        (["--out", "out", "--transplant", "first"], "must be begin or numbers with commas between, got 'first'"),
        (["--out", "out", "--transplant", "13"], "token 13 is outside the vocabulary 0..12"),
    ],
)
def test_mistakes_are_one_line(llama, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(SystemExit, match="2"):
        run_main(export.main, [str(llama), *arguments], "oasis_jax export")
    assert message in capsys.readouterr().err


def test_another_format_is_refused(llama, tmp_path):
    save_pretrained(transplant_sink(load_pretrained(llama)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for broken, message in (
        ({"model_type": "oasis"}, "no 'oasis' section"),
        (config | {"oasis": {"model": config["oasis"]["model"] | {"widht": 3}}}, "widht"),
        (config | {"oasis": {"model": config["oasis"]["model"] | {"num_layers": 3}}}, "has shape"),
    ):
        (tmp_path / "out/config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message):
            load_pretrained(tmp_path / "out")


def test_a_library_tokenizer_gives_the_bytes_of_every_token():
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "Ġ": 1, "é": 2, "Ġa": 3, "<s>": 4}, [("Ġ", "a")]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<s>"])
    found = LibraryTokenizer(library.to_str(), begin_id=4, separator_id=None)
    assert found.decode([0, 3, 4, 2, 99]) == b"a a\xe9" and found.vocab_size == 5
    assert 4 not in found.encode("a<s>a").tolist()


def test_a_head_that_was_tied_by_default_says_that_it_no_longer_is(llama, tmp_path):
    """GraniteSWA's heads are tied where config.json says nothing of it."""
    model = load_pretrained(llama)
    granite = {name: value for name, value in CONFIG.items() if name != "tie_word_embeddings"}
    granite |= {"model_type": "granite_swa", "layer_types": ["full_attention"] * 2, "attention_multiplier": 6**-0.5}
    for tied in (True, False):
        config = dataclasses.replace(model.config, tied_head=tied)
        changed = save.written_config(model.replace(config=config, source_config=granite), "granite_swa", "float32")
        assert changed.get("tie_word_embeddings", True) == tied


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_run_comes_out_in_the_type_asked_for(tmp_path, monkeypatch, dtype):
    config = ModelConfig(preset="oasis", width=12, num_heads=3, num_layers=1, vocab_size=8)
    params = {"embedding": {"table": jnp.ones((8, 12))}}
    run = LoadedRun(params, UNSHARDED, Config(model=config), None, {}, {}, 3)
    monkeypatch.setattr("oasis_jax.training.load.load_run", lambda *_, **__: run)
    (tmp_path / "checkpoints").mkdir()
    model = load_pretrained(tmp_path, dtype=dtype)
    assert model.config.dtype == str(model.params["embedding"]["table"].dtype) == (dtype or "float32")


@pytest.mark.parametrize("kind", sampled(["bytes", "bpe"], ("bpe",)))
def test_a_tokenizer_that_was_trained_here_comes_back_with_its_special_tokens(tmp_path, kind):
    tokenizer = TOKENIZERS[kind].train([b"to be or not to be, that is the question"] * 3, 270)
    config = ModelConfig(preset="oasis", width=12, num_heads=3, num_layers=2, vocab_size=tokenizer.vocab_size)
    params = initial_params(config, jax.random.key(0))
    model = Pretrained(config, params, tokenizer=tokenizer, begin_token=tokenizer.begin_id)
    assert save_pretrained(model, tmp_path / "out") == "oasis"
    back = load_pretrained(tmp_path / "out")
    assert back.tokenizer.identity == tokenizer.identity and back.begin_token == tokenizer.begin_id
    chex.assert_trees_all_equal(back.params, params)
