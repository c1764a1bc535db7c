"""Files that are damaged, contradict themselves or want to run code: one line that names what and where."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from pretrained import tiny

from oasis_jax.errors import UserError
from oasis_jax.pretrained import load_pretrained
from oasis_jax.pretrained.families import FAMILIES, read_model_config

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
FIRST_SHARD = "model-00001-of-00003.safetensors"


def refused(source, *parts: str) -> str:
    """The message of the UserError, one line with all these parts in it."""
    with pytest.raises(UserError) as found:
        load_pretrained(source)
    message = str(found.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def changed(name: str, function) -> dict[str, np.ndarray]:
    values = tiny.tensors()
    return values | {name: np.asarray(function(values[name].copy()))}


def with_value(name: str, value: float) -> dict[str, np.ndarray]:
    def put(array):
        array.flat[-1] = value
        return array

    return changed(name, put)


@pytest.mark.parametrize("change", [dict(model_type="mamba2"), dict(model_type="llama4"), dict(model_type="gpt_neox")])
def test_an_unknown_family_lists_those_that_are_known(tmp_path, change):
    refused(tiny.write(tmp_path, **change), change["model_type"], *FAMILIES)


def test_no_family_at_all(tmp_path):
    refused(tiny.write(tmp_path, model_type=None), "model_type", *FAMILIES)
    refused(tiny.write(tmp_path, model_type=["llama"]), "model_type", *FAMILIES)


def test_a_missing_shard(tmp_path):
    (tiny.write(tmp_path, shards=3) / FIRST_SHARD).unlink()
    refused(tmp_path, FIRST_SHARD, "missing")


def test_a_shard_without_its_tensor(tmp_path):
    tiny.write(tmp_path, shards=3)
    values = safetensors.numpy.load_file(tmp_path / FIRST_SHARD)
    name = sorted(values)[1]
    del values[name]
    safetensors.numpy.save_file(values, tmp_path / FIRST_SHARD)
    refused(tmp_path, name, FIRST_SHARD)


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/etc/passwd", "..", "", "folder/model.safetensors", 7, ["x"], None]
)
def test_an_index_that_leaves_its_folder(tmp_path, file):
    tiny.write(tmp_path / "other")
    tiny.write(tmp_path / "model", shards=3)
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q_PROJ] = file
    path.write_text(json.dumps(index))
    refused(tmp_path / "model", "index.json", repr(file))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}", '{"weight_map": "x"}'])
def test_an_index_that_is_none(tmp_path, text):
    (tiny.write(tmp_path, shards=3) / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index.json")


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_a_truncated_safetensors_file(tmp_path, kept):
    file = tiny.write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "model.safetensors", "cannot be read")


@pytest.mark.parametrize("kind", ["int32", "bool", "int8"])
def test_a_type_that_cannot_be_read(tmp_path, kind):
    tiny.write(tmp_path, values=changed(Q_PROJ, lambda x: x.astype(kind)))
    refused(tmp_path, Q_PROJ, "F32")


def test_a_shape_that_contradicts_the_config(tmp_path):
    tiny.write(tmp_path, values=changed(Q_PROJ, lambda x: x[:-10].copy()))
    refused(tmp_path, Q_PROJ, "(20, 24)", "(30, 24)")
    refused(tiny.write(tmp_path, intermediate_size=48, values=tiny.tensors()), "mlp.", "(40, 24)", "(48, 24)")
    refused(tiny.write(tmp_path, vocab_size=208, values=tiny.tensors()), "embed_tokens", "(211, 24)", "(208, 24)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_value_that_is_not_finite(tmp_path, name, value):
    refused(tiny.write(tmp_path, values=with_value(name, value)), name, "not finite")


def test_a_tensor_that_is_missing(tmp_path):
    values = tiny.tensors()
    del values[Q_PROJ], values["model.norm.weight"]
    refused(tiny.write(tmp_path, values=values), f"{Q_PROJ!r}, 'model.norm.weight' are missing")


def test_tensors_left_over(tmp_path):
    extra = {"model.layers.2.mlp.up_proj.weight": np.ones((40, 24), np.float32), "vision.weight": np.ones(3)}
    refused(tiny.write(tmp_path, values=tiny.tensors() | extra), "model.layers.2.mlp.up_proj.weight", "vision.weight")
    values = tiny.tensors()
    del values[Q_PROJ]
    refused(tiny.write(tmp_path, values=values | extra), f"tensor {Q_PROJ!r} is missing; tensors", "vision.weight")
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(30, np.float32)}
    refused(tiny.write(tmp_path, values=tiny.tensors() | bias), "model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_how_to_convert_them(tmp_path, name):
    tiny.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR.")
    refused(tmp_path, name, "pickle", "save_pretrained")
    refused(tmp_path / name, name, "pickle", "save_pretrained")


def test_what_is_no_model(tmp_path):
    refused(tmp_path / "nothing", "no such folder")
    refused(tmp_path, "config.json")
    (tiny.write(tmp_path) / "model.safetensors").rename(tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "folder")
    refused(tmp_path / "config.json", ".gguf")
    tiny_copy = tmp_path / "b.safetensors"
    tiny_copy.write_bytes((tmp_path / "a.safetensors").read_bytes())
    refused(tmp_path, "2 safetensors files", "index")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    refused(tmp_path, "no *.safetensors")


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    vocabulary = {f"token{i}": i for i in range(300)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="token0"))
    library.save(str(tiny.write(tmp_path) / "tokenizer.json"))
    refused(tmp_path, "300", "211")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"type": "Unheard"}}'])
def test_a_tokenizer_that_is_none(tmp_path, text):
    (tiny.write(tmp_path) / "tokenizer.json").write_text(text)
    refused(tmp_path, "tokenizer.json")


def test_code_in_the_folder_is_never_executed(tmp_path):
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    tiny.write(tmp_path, auto_map=auto)
    ran = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnConfig: pass\nclass OwnModel: pass\n")
    assert load_pretrained(tmp_path).config.num_layers == 2
    refused(tiny.write(tmp_path, auto_map=auto, model_type="own"), "'own'")
    assert not ran.exists() and "modeling_own" not in sys.modules


def test_a_hub_without_a_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Cannot reach the hub:\nName or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refused("owner/model", "owner/model", "Cannot reach the hub", "local folder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("owner/model", "owner/model", "not installed", "local folder")


def test_a_model_from_a_hub(tmp_path, monkeypatch):
    """A cache of the hub: links beside blobs, whose names say nothing."""
    tiny.write(tmp_path / "whole", shards=3)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "whole").iterdir())):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(pathlib.Path("..") / ".." / "blobs" / f"{number:040x}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(snapshot))
    found, whole = load_pretrained("owner/model"), load_pretrained(tmp_path / "whole")
    assert found.card["name"] == "model"
    assert np.array_equal(found.params["layers"]["mlp"]["up"], whole.params["layers"]["mlp"]["up"])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"llama"', "{}", "[" * 100_000, '{"model_type": "llama", "a": ' + "9" * 5000]
)
def test_a_config_that_is_none(tmp_path, text):
    (tiny.write(tmp_path) / "config.json").write_text(text)
    refused(tmp_path, "config.json")


def test_a_config_that_is_no_text(tmp_path):
    (tiny.write(tmp_path) / "config.json").write_bytes(bytes(range(256)))
    refused(tmp_path, "config.json")


def test_config_keys_that_nobody_knows(tmp_path):
    refused(tiny.write(tmp_path, quantization_config={"bits": 4}), "quantization_config", "not understood")
    refused(tiny.write(tmp_path, sliding_window=7, zeta=None, omega=1), "omega=1", "sliding_window")
    refused(tiny.write(tmp_path, hidden_act="gelu"), "hidden_act", "silu")
    assert load_pretrained(tiny.write(tmp_path, zeta=None)).config.window == 0


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), ("rope_theta", "contradict")),
        (dict(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2}), ("linear", "yarn", "contradict")),
        (
            dict(rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_type": "linear", "factor": 4}),
            ("factor", "contradict"),
        ),
        (dict(rope_scaling={"type": "dynamic", "factor": 2}), ("dynamic", "llama3", "longrope")),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2, "warp": 1}), ("warp",)),
        (dict(rope_scaling={"rope_type": "linear"}), ("factor",)),
        (dict(rope_scaling={"rope_type": "linear", "factor": "2"}), ("factor", "'2'")),
        (dict(rope_scaling=[1]), ("rope_scaling",)),
        (dict(rope_parameters={"rope_type": 3}), ("rope_type",)),
        (dict(rope_scaling=LLAMA3 | {"high_freq_factor": 0.5, "original_max_position_embeddings": 16}), ("frequency",)),
        (dict(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), ("longrope",)),
        (dict(rope_scaling={"type": "longrope", "short_factor": 1, "long_factor": [None]}), ("short_factor",)),
        (dict(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
        (dict(rope_theta=0), ("rope_theta",)),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}), ("mscale",)),
    ],
    ids=str,
)
def test_rotary_positions_that_contradict_themselves(tmp_path, changes, parts):
    refused(tiny.write(tmp_path, **changes), "config.json", *parts)


def test_numbers_that_do_not_fit_together(tmp_path):
    refused(tiny.write(tmp_path, num_key_value_heads=2, values={"x": np.ones(1)}), "config.json", "num_kv_heads")
    refused(tiny.write(tmp_path, head_dim=9, values={"x": np.ones(1)}), "config.json", "head_dim")


# One config of every family, small, with all that the family reads.
CONFIGS = {
    "llama": tiny.CONFIG | {"attention_bias": False, "mlp_bias": False, "rope_theta": 1e4, "rope_scaling": LLAMA3},
    "mistral": tiny.CONFIG | {"model_type": "mistral", "sliding_window": 7},
    "qwen2": tiny.CONFIG
    | {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": tiny.CONFIG | {"model_type": "qwen3", "layer_types": ["full_attention"] * 2, "sliding_window": None},
    "phi3": tiny.CONFIG
    | {
        "model_type": "phi3",
        "head_dim": 8,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 2, 3], "long_factor": [2, 3, 4]},
    },
    "granite_swa": tiny.CONFIG
    | {
        "model_type": "granite_swa",
        "layer_types": ["full_attention", "sliding_attention"],
        "layer_rope_theta": [0, 1e4],
        "sliding_window": 7,
        "embedding_multiplier": 2,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 3,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 211,
        "hidden_size": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 24,
        "activation_function": "relu",
        "enable_bias": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 211,
        "n_embd": 24,
        "n_inner": None,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
    },
}
# As Python reads them from JSON, which knows NaN, Infinity and whole numbers of any size.
WRONG = [
    "text", "", [], [1], ["x"], {}, {"a": 1}, True, False, None, -1, 0, 0.5, 1e300, float("nan"), float("inf"),
    10**20, 10**400, -(10**5000), [float("nan")], [None], [[]],
]  # fmt: skip


def test_every_family_has_a_config_here():
    assert list(CONFIGS) == list(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_wrong_value_in_a_config_is_a_line_and_never_a_traceback(family):
    """Whatever stands where; a value that is accepted gives a config, which is checked against the tensors."""
    config, refusals = CONFIGS[family], 0
    read_model_config(config, "here")
    groups = {(name,): value for name, value in config.items()}
    groups |= {("rope_scaling", name): value for name, value in config.get("rope_scaling", {}).items()}
    for path in groups:
        for value in WRONG:
            other = config | {path[0]: value if len(path) == 1 else config[path[0]] | {path[1]: value}}
            try:
                read_model_config(other, "here")
            except UserError as error:
                assert re.fullmatch(r"here[:,] .*", str(error)), str(error)
                assert len(str(error)) < 600
                refusals += 1
    assert refusals > 10 * len(config)


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_a_text_is_not_taken_for_true_or_false(tmp_path, name):
    refused(tiny.write(tmp_path, **{name: "false"}), name, "'false'")


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("opt", dict(do_layer_norm_before=False), "OPT-350m"),
        ("opt", dict(word_embed_proj_dim=12), "OPT-350m"),
        ("opt", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        ("opt", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
        ("opt", dict(activation_function="tanh"), "relu"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        ("gpt2", dict(activation_function="tanh"), "gelu_new"),
        ("granite_swa", dict(logits_scaling=0), "logits_scaling"),
        ("granite_swa", dict(layer_types=["full_attention"]), "num_hidden_layers"),
        ("granite_swa", dict(layer_rope_theta=[0]), "num_hidden_layers"),
        ("granite_swa", dict(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        ("granite_swa", dict(sliding_window=None), "sliding_window"),
        ("qwen2", dict(use_sliding_window=False, layer_types=["sliding_attention"] * 2), "sliding_window"),
        ("phi3", dict(lm_head_bias=True), "lm_head_bias"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(family, changes, part):
    with pytest.raises(UserError, match=part):
        read_model_config(CONFIGS[family] | changes, "here")
