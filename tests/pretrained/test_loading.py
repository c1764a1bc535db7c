"""What loading gives: types, ties, tensors one at a time, and meshes."""

import json
import pathlib
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from pretrained import tiny
from programs import UNOPTIMIZED, on_devices

from oasis_jax.model.head import padded_vocab
from oasis_jax.pretrained import load_pretrained
from oasis_jax.pretrained.folder import Folder

HERE = pathlib.Path(__file__).parent


def test_a_tensor_lies_where_the_mathematics_has_it(tmp_path):
    """Out-by-in matrices become in-by-out, heads get an axis, layers one in front, the vocabulary is padded."""
    values = tiny.tensors()
    params = load_pretrained(tiny.write(tmp_path, values=values)).params
    layer = "model.layers.1."
    query, output = (values[f"{layer}self_attn.{name}_proj.weight"] for name in "qo")
    assert np.array_equal(params["layers"]["attention"]["query"][1], query.T.reshape(24, 3, 10))
    assert np.array_equal(params["layers"]["attention"]["output"][1], output.T.reshape(3, 10, 24))
    assert np.array_equal(params["layers"]["mlp"]["down"][1], values[f"{layer}mlp.down_proj.weight"].T)
    assert np.array_equal(params["layers"]["mlp_norm"]["scale"][1], values[f"{layer}post_attention_layernorm.weight"])
    table, kernel = params["embedding"]["table"], params["head"]["kernel"]
    assert table.shape == (padded_vocab(211), 24) and kernel.shape == (24, padded_vocab(211))
    assert np.array_equal(table[:211], values["model.embed_tokens.weight"]) and not table[211:].any()
    assert np.array_equal(kernel[:, :211], values["lm_head.weight"].T) and not kernel[:, 211:].any()


@pytest.mark.parametrize("kind", ["float64", "float16", ml_dtypes.bfloat16])
def test_types_of_files_and_of_models(tmp_path, kind):
    values = {name: x.astype(kind) for name, x in tiny.tensors().items()}
    tiny.write(tmp_path, values=values)
    for dtype in ("float32", "bfloat16"):
        model = load_pretrained(tmp_path, dtype=dtype)
        assert model.config.dtype == dtype
        found = model.params["layers"]["mlp"]["up"]
        assert found.dtype == dtype
        expected = jnp.asarray(values["model.layers.0.mlp.up_proj.weight"].T.astype(np.float64), dtype)
        assert jnp.array_equal(found[0], expected)


def test_a_tied_model_may_carry_its_head_twice_and_old_files_buffers(tmp_path):
    config = tiny.CONFIG | {"tie_word_embeddings": True}
    values = tiny.tensors(config)
    more = {
        "lm_head.weight": values["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32),
    }
    model = load_pretrained(tiny.write(tmp_path, config, values | more))
    assert model.config.tied_head and "head" not in model.params


def test_shards_and_a_second_file(tmp_path):
    whole = load_pretrained(tiny.write(tmp_path / "one"))
    parts = load_pretrained(tiny.write(tmp_path / "three", shards=3))
    safetensors.numpy.save_file({"x": np.ones(3)}, tmp_path / "one" / "consolidated.safetensors")
    for other in (parts, load_pretrained(tmp_path / "one")):
        same = jax.tree.map(np.array_equal, whole.params, other.params)
        assert all(jax.tree.leaves(same))


def test_the_decoder_of_a_model(tmp_path):
    model = load_pretrained(tiny.write(tmp_path))
    logits, statistics = nnx.jit(lambda decoder, ids: decoder(ids))(model.decoder(), jnp.arange(12)[None])
    assert logits.shape[:2] == (1, 12) and len(statistics.attention) == 2
    assert model.card["family"] == "llama" and model.tokenizer is None and model.begin_token is None


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Host memory holds no second tensor while one is read: what was read before is gone."""
    alive, most, read = [], 0, Folder.read

    def watched(self, name):
        nonlocal most
        array = np.array(read(self, name))  # owns its memory, so that it dies with the last who looks at it
        if array.ndim > 1:  # a parameter on a CPU may be the very memory of a vector
            alive[:] = [other for other in alive if other() is not None] + [weakref.ref(array)]
            most = max(most, len(alive))
        return array

    monkeypatch.setattr(Folder, "read", watched)
    load_pretrained(tiny.write(tmp_path))
    assert most == 1


def test_a_mesh_of_eight_devices_holds_the_same_parameters(tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    tiny.write(tmp_path, shards=2, **sizes)
    environment = on_devices(8, UNOPTIMIZED)
    mesh = json.dumps(dict(data=2, fsdp=2, tensor=2))
    command = [sys.executable, "-W", "error", HERE / "eight_devices.py", tmp_path, mesh]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["leaves"] == [12, 12] and not found["different"]
    assert found["devices"] == [8]
    assert found["query"] == [[2, 32, 4, 10], [2, 16, 2, 10]]
