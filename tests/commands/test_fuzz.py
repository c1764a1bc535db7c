"""500 made-up configs, files and command lines: each does what it says or ends with exit code 2 and one line."""

import pathlib
import random

import numpy as np
import pytest

from oasis_jax.__main__ import main
from oasis_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
DEMO = (ROOT / "configs" / "demo.py").read_bytes()

# What stands where a number, a name or a folder should.
NUMBERS = [
    "", "nan", "inf", "-inf", "-1", "0", "-0.0", "1", "3", "7", "0.5", "1e308", "1e30", "1e9", "1e-45", "1e9999", "²",
    "٣", "0x10", "1_000", "[1]", "None", "9" * 5000, "true", "1,5", "1e", "--", "2147483647",
]  # fmt: skip
WORDS = [
    "softmax",
    "oasis",
    "sinks",
    "a b",
    "\x1b[31mred",
    "[bold]x",
    "<script>alert(1)</script>",
    "a\nb",
    "ü\udcff",
    "'",
]
# {} stands for a folder or file of `places`, OUT for one to write.
LINES = {
    "train": ["--config={}", "--workdir={}"],
    "train ": ["--config=demo", "--workdir=OUT"],
    "eval": ["--workdir={}", "--report=OUT"],
    "eval ": ["--model={}", "--report=OUT"],
    "generate": ["once", "--model={}"],
    "generate ": ["once", "--workdir={}"],
    "export": ["{}", "--out=OUT"],
    "show": ["{}"],
    "prepare": ["--source={}", "--tokenizer=bytes", "--out=OUT"],
    "prepare ": ["--source={}/*.txt", "--tokenizer={}", "--out={}"],
    "prepare  ": ["--out={}", "--verify"],
    "perplexity": ["--model={}", "--text={}", "--window=8", "--stride=4"],
}
FLAGS = {
    "train": ["--profile", "--processes", "--set"],
    "eval": [
        "--batches", "--measures", "--interventions", "--quantize", "--text", "--length", "--batch-size", "--tasks",
        "--begin-token", "--dtype", "--transplant", "--set",
    ],
    "generate": ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--kv-cache", "--set"],
    "export": ["--dtype", "--transplant", "--set"],
    "show": ["--set"],
    "prepare": ["--licence", "--set"],
    "perplexity": ["--begin-at", "--batch-size", "--out"],
}  # fmt: skip
FIELDS = [
    "model.width", "model.num_heads", "model.num_layers", "model.preset", "model.normalizer", "model.clip_alpha",
    "model.clip_gamma", "model.clip_zeta", "model.null_weight", "model.norm_epsilon", "model.residual_clip",
    "model.blocks", "model.window", "model.rope_theta", "model.rope_fraction", "model.logit_softcap", "model.null_keys",
    "model.router_init_std", "model.head_dim", "model.num_kv_heads", "model.mlp_dim", "model.learned_positions",
    "model.vocab_size", "model.attention_scale", "model.recency_bias_init", "model.embedding_multiplier", "model.stack",
    "data.batch_size", "data.sequence_length", "data.holdout_fraction", "data.corpus", "data.pattern", "data.tokenizer",
    "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.beta1", "optimizer.accumulation_steps",
    "optimizer.clip_norm", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.rules", "run.steps", "run.seed",
    "run.keep_best", "run.checkpoint_interval", "run.init_from", "run.init_null", "model.layer_pattern", "modle.width",
    "model.widht", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> list[str]:
    """Folders and files of others: empty, foreign, torn and damaged ones."""
    root = tmp_path_factory.mktemp("places")
    noise = np.random.default_rng(0).bytes(300)
    torn = root / "torn"
    (torn / "checkpoints" / "7" / "metadata").mkdir(parents=True)
    (torn / "checkpoints" / "7" / "metadata" / "metadata").write_bytes(noise)
    (torn / "metrics.jsonl").write_bytes(b'{"step": "x"}\n[1]\n' + noise)
    (root / "bare" / "checkpoints").mkdir(parents=True)
    (root / "empty").mkdir()
    for name, config in dict(foreign=b"[]", torn_json=b'{"model_type": "llama"', other=b'{"model_type": "x"}').items():
        (root / name).mkdir()
        (root / name / "config.json").write_bytes(config)
        (root / name / "model.safetensors").write_bytes(noise)
    (root / "noise.gguf").write_bytes(b"GGUF" + noise)
    (root / "noise.py").write_bytes(noise)
    (root / "noise.txt").write_bytes(noise)
    (root / "no_config.py").write_text("x = 1\n")
    (root / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (root / "loops.py").write_text("def get_config():\n    return get_config()\n")
    (root / "leaves.py").write_text("import sys\n\n\ndef get_config():\n    sys.exit('bye')\n")
    return ["", str(root / "missing"), str(root / "missing\x1b[31m"), *map(str, sorted(root.iterdir()))]


def damaged_config(chance: random.Random, path: pathlib.Path) -> str:
    """The demo's config with some bytes removed, doubled or replaced."""
    text = bytearray(DEMO)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(text))
        kind = chance.choice(["cut", "drop", "noise", "number"])
        if kind == "cut" and chance.random() < 0.2:
            del text[at:]
            break
        if kind == "number":
            numbers = [i for i, c in enumerate(text) if chr(c).isdigit()]
            at = chance.choice(numbers)
            text[at : at + 1] = chance.choice(NUMBERS[:17]).encode()
        elif kind == "drop":
            del text[at : at + chance.randint(1, 4)]
        else:
            text[at : at + 1] = bytes(chance.choices(range(256), k=2))
    path.write_bytes(text)
    return str(path)


def command_line(chance: random.Random, places: list[str], folder: pathlib.Path) -> list[str]:
    value = lambda: chance.choice(NUMBERS + WORDS + 3 * places)
    assignment = lambda: f"{chance.choice(FIELDS)}={chance.choice(NUMBERS + WORDS)}"
    kind = chance.choice(["set", "set", "config", "flags", "flags", "flags"])
    if kind == "set":
        words = [f"--set={assignment()}" for _ in range(chance.randint(1, 2))]
        return chance.choice([["show", "demo"], ["train", "--config=demo", f"--workdir={folder}"]]) + words
    if kind == "config":
        return ["show", damaged_config(chance, folder / "config.py")]
    command = chance.choice(list(LINES))
    words = [word.replace("{}", chance.choice(places)).replace("OUT", str(folder / "out")) for word in LINES[command]]
    for flag in chance.sample(FLAGS[command.strip()], chance.choice([0, 0, 1, 2]) % (1 + len(FLAGS[command.strip()]))):
        words.append(f"{flag}={assignment() if flag == '--set' else value()}")
    return [command.strip(), *words]


@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_command_lines(seed, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "fit", lambda *args, **options: None)  # what is accepted does not train
    monkeypatch.chdir(tmp_path)
    chance = random.Random(seed)
    wrong, refused = [], 0
    for _ in range(100):
        argv = command_line(chance, places, tmp_path)
        try:
            main(argv)
        except SystemExit as end:
            said = capsys.readouterr().err
            refused += end.code == 2
            *notes, error = said.splitlines() or [""]
            lines = [line for line in notes if not (argv[0] == "prepare" and line.endswith("bytes of text"))]
            if end.code not in (0, 2) or lines or (end.code == 2) != ("error: " in error):
                wrong.append((argv, end.code, said))
            elif not said.removesuffix("\n").replace("\n", "").isprintable():
                wrong.append((argv, "control characters", said))
        except BaseException as error:
            capsys.readouterr()
            wrong.append((argv, type(error).__name__, str(error)[:300]))
    assert not wrong, "\n".join(map(str, wrong))
    assert refused > 50
