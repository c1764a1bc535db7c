"""Single flipped bits and cuts in files that are read of others, and in those that are written here: the same result, a
refusal in one line, or, where a format has no checksum, other numbers. Never a traceback, a hang or a huge allocation.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import resource
from collections.abc import Callable
from typing import Any

import gguf
import pytest
import tokenizers
from damage import search
from pretrained import tiny
from study.study_toys import record as study_record
from study.study_toys import toy_study

from oasis_jax.config import DataConfig
from oasis_jax.data import eval_batches, load_corpus, prepare
from oasis_jax.data.tokenizers import TiktokenTokenizer
from oasis_jax.model.decoder import check_model
from oasis_jax.pretrained.load import source_model, source_tokenizer
from oasis_jax.pretrained.source import open_source
from oasis_jax.pretrained.tokenizer import open_tokenizer
from oasis_jax.study.cells import RESULT
from oasis_jax.study.kept import kept_records
from oasis_jax.study.records import write_json
from oasis_jax.study.results import as_json, results
from oasis_jax.study.run import IDENTITY
from oasis_jax.study.run import prepare as begin_study
from oasis_jax.training.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.faults

CASES = 300
Made = tuple[list[str], Callable[[pathlib.Path], Any]]  # the files to damage, and what reads their folder


def tokenizer_facts(tokenizer) -> list:
    ids = tokenizer.encode("w1 w2 plums and w77").tolist()
    return [ids, tokenizer.decode(ids), tokenizer.byte_lengths.tolist(), tokenizer.begin_id, tokenizer.separator_id]


def model_facts(path: pathlib.Path) -> list:
    """All that is read of a model's files."""
    source = open_source(path)
    config = source_model(source)
    check_model(config)
    tokenizer, begin = source_tokenizer(source, config)
    arrays = {name: hashlib.sha256(source.read(name).tobytes()).hexdigest() for name in source.shapes}
    return [config, begin, source.chat_template(), source.shapes, arrays, tokenizer and tokenizer_facts(tokenizer)]


def safetensors(folder: pathlib.Path) -> Made:
    tiny.small_checkpoint(folder, "llama")
    return ["model.safetensors"], model_facts


def texts_of_a_model(folder: pathlib.Path) -> Made:
    tiny.small_checkpoint(folder, "llama")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False)
    library.train_from_iterator(["plums and w77 w1 w2 the "] * 9, trainer)
    library.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{bos_token}}{{messages}}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(rope_theta=1e4, rope_scaling=scaling | dict(original_max_position_embeddings=32))
    (folder / "config.json").write_text(json.dumps(config))
    return ["tokenizer.json", "tokenizer_config.json", "config.json"], model_facts


def gguf_file(folder: pathlib.Path) -> Made:
    from pretrained.gguf_files import SIZES, write_gguf

    def more(writer: gguf.GGUFWriter) -> None:
        tokens = ["<s>", "</s>", *map(chr, range(33, 123)), "Ġ", "Ġw", "pl", "um", *(f"t{i}" for i in range(115))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * 209)
        writer.add_token_merges(["Ġ w", "p l", "u m"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{bos_token}}{{messages}}")

    folder.mkdir()
    config = tiny.CONFIG | SIZES
    write_gguf(folder / "m.gguf", config, tiny.tensors(config), gguf.GGMLQuantizationType.Q8_0, more)
    return ["m.gguf"], lambda path: model_facts(path / "m.gguf")


def sentencepiece(folder: pathlib.Path) -> Made:
    library = pytest.importorskip("sentencepiece")
    folder.mkdir()
    texts = ["plums and pears and w1 w2 w77", "the quick brown fox"] * 50
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    return ["m.model"], lambda path: tokenizer_facts(open_tokenizer(str(path / "m.model")))


def tiktoken(folder: pathlib.Path) -> Made:
    pytest.importorskip("tiktoken")
    folder.mkdir()
    tokens = [*(bytes([i]) for i in range(256)), b"pl", b"an", b"and"]
    ranks = {base64.b64encode(token).decode(): i for i, token in enumerate(tokens)}
    made = TiktokenTokenizer(ranks, r"\w+|\s+|[^\w\s]+", {"<|endoftext|>": len(tokens)})
    (folder / "oasis_tokenizer.json").write_text(made.to_json())
    return ["oasis_tokenizer.json"], lambda path: tokenizer_facts(open_tokenizer(str(path)))


def prepared_shards(folder: pathlib.Path) -> Made:
    texts = folder.with_name("texts")
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"{i} plums and {i * i} pears " * 40)
    fields = dict(tokenizer="bpe", bpe_vocab_size=290, sequence_length=32, batch_size=4, packing="best_fit")
    config = DataConfig(corpus="files", pattern=f"{texts}/*.txt", holdout_fraction=0.2, **fields)
    prepare.prepare(config, None, folder, shard_bytes=9000)

    def read(path: pathlib.Path) -> list:
        asked = dataclasses.replace(config, corpus="prepared", pattern=str(path))
        corpus, found = load_corpus(asked, seed=0), []
        for part in (corpus.train, corpus.heldout):
            batches = eval_batches(part, asked, num_batches=-(-len(part) // asked.batch_size))
            found += [{name: x.tolist() for name, x in batch.items()} for batch in batches]
        return [found, tokenizer_facts(corpus.tokenizer)]

    files = sorted(path.name for path in folder.iterdir() if path.stat().st_size)
    return [*files, *["index.json"] * len(files)], read


def study_folder(folder: pathlib.Path) -> Made:
    study, names = toy_study(), [IDENTITY]
    begin_study(study, folder)
    for cell in study.cells():
        (folder / cell.path).mkdir(parents=True)
        names.append(f"{cell.path}/{RESULT}")
        record = study_record(cell.method, cell.seed, squared_error=0.3 + 0.1 * cell.seed)
        write_json(folder / names[-1], record | {"identity": study.identity(cell)})

    def read(path: pathlib.Path) -> list:
        begin_study(study, path)
        records = kept_records(study, path)
        return [records, as_json(results(study, records))]

    return names, read


def metrics(folder: pathlib.Path) -> Made:
    folder.mkdir()

    def writing(path: pathlib.Path, step: int) -> contextlib.AbstractContextManager:
        return MetricsWriter(path, step=step, check=lambda: None, tensorboard=False, wandb=None)

    with writing(folder, 0) as writer:
        for step in range(1, 30):
            writer.write(step, {"loss": 3 / step, "eval/loss": 2.0})

    def read(path: pathlib.Path) -> list:
        found = read_metrics(path)
        with writing(path, 20) as writer:  # as a run that goes on from its checkpoint of step 20
            writer.write(21, {"loss": 1.0})
        lines = [*found, *read_metrics(path)]
        return [{name: value for name, value in line.items() if name != "time"} for line in lines]

    return ["metrics.jsonl"], read


# What is made here, and whether its files say themselves whether they are what was written.
FORMATS = {
    safetensors: False,
    texts_of_a_model: False,
    gguf_file: False,
    sentencepiece: False,
    tiktoken: False,
    metrics: False,
    prepared_shards: True,
    study_folder: True,
}


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_flipped_bits_and_cuts(make, tmp_path, record):
    names, read = make(tmp_path / "whole")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts, wrong = search(tmp_path / "whole", names, read, CASES, seed=11)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10
    assert not wrong, "\n".join(wrong)
    assert grown < 1024, f"{grown} MiB more than before"
    assert counts["refused"] or make is metrics
    assert not (FORMATS[make] and counts["other"])
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("refused", "same", "other"))
    record(f"damaged {make.__name__.replace('_', ' ')}: {CASES} flips and cuts: {kinds}")
