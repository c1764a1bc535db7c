"""Data sets of the package `datasets` as sources, and a preparation in several processes."""

import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hub_server import hub as served

from oasis_jax.commands.prepare import main
from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, prepare, sources
from oasis_jax.data.prepared import ShardedTokens, verify
from oasis_jax.data.workers import Workers
from oasis_jax.errors import UserError

CONFIG = DataConfig(corpus="files", pattern="unused", tokenizer="bytes", sequence_length=11, holdout_fraction=0.25)


def words(count, seed):
    return " ".join(np.random.default_rng(seed).choice(["pear", "fig", "zwölf", "漢字"], count))


def content(out, index, part):
    return ShardedTokens(out, index["parts"][part]["shards"], np.dtype(index["dtype"]))[:]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder that `datasets` wrote, with two splits, and the texts of the first."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("tables") / "set"
    texts = [words(5 + i, i) for i in range(37)]
    train = datasets.Dataset.from_dict({"body": [*texts, "", None, texts[3]], "number": list(range(40))})
    datasets.DatasetDict({"train": train, "validation": train.select(range(5))}).save_to_disk(str(folder))
    return folder, texts


def test_a_data_set_is_its_rows(table, tmp_path, monkeypatch):
    folder, texts = table
    monkeypatch.setattr(sources, "_ROWS", 7)  # so that there are several pieces
    index = prepare.prepare(CONFIG, None, tmp_path / "hub", sources=[f"hf:{folder}:train:body"])
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i:03d}.txt").write_text(text)
    files = prepare.prepare(CONFIG, None, tmp_path / "files", sources=[f"{tmp_path}/texts/*.txt"])
    for part in ("train", "heldout"):
        ours, theirs = content(tmp_path / "hub", index, part), content(tmp_path / "files", files, part)
        assert len(ours) and ours.tobytes() == theirs.tobytes()
    assert index["left_out"] == [
        "left out: 2 empty documents",
        "left out: 1 documents, which repeat the content of others",
    ]
    assert load_corpus(dataclasses.replace(CONFIG, corpus="prepared", pattern=str(tmp_path / "hub")), seed=0).identity[
        "files"
    ] == len(range(0, 40, 7))


def test_a_data_set_says_its_licence(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, licence in {"one": "cc0-1.0", "two": "mit", "three": "cc0-1.0", "four": ""}.items():
        found = datasets.Dataset.from_dict(
            {"text": [f"{name} {words(9, 4)}"]}, info=datasets.DatasetInfo(license=licence)
        )
        found.save_to_disk(str(tmp_path / name))
    named = [f"hf:{tmp_path / name}" for name in ("one", "two", "three", "four")]
    config = dataclasses.replace(CONFIG, holdout_fraction=0.25)
    assert prepare.prepare(config, None, tmp_path / "a", sources=named)["licence"] == "cc0-1.0, mit"
    assert prepare.prepare(config, None, tmp_path / "b", sources=named, licence="mine")["licence"] == "mine"
    assert prepare.prepare(config, None, tmp_path / "c", sources=named[3:] + named[3:])["licence"] == ""


def test_sources_are_joined(table, tmp_path):
    folder, texts = table
    (tmp_path / "more.txt").write_text(words(400, 99))
    named = [f"hf:{folder}:validation:body", f"{tmp_path}/more.txt"]
    index = prepare.prepare(CONFIG, None, tmp_path / "out", sources=named)
    both = [*texts[:5], (tmp_path / "more.txt").read_text()]
    assert sum(index["parts"][part]["bytes"] for part in ("train", "heldout")) == sum(len(t.encode()) for t in both)
    assert index["source"] == named


@pytest.mark.parametrize(
    "rest, message",
    [
        ("", "column: unknown name 'text'; allowed: body, number"),
        (":train:bodi", "(did you mean 'body'?); allowed: body, number"),
        (":train:number", "the column 'number' is not text but int64"),
        (":test", "split: unknown name 'test'; allowed: train, validation"),
        ("-gone", "there is no folder"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(table, rest, message):
    with pytest.raises(UserError) as caught:
        sources.pieces_of(f"hf:{table[0]}{rest}", "text")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def parquet(**columns):
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    tables.write_table(pyarrow.table(columns), content)
    return content.getvalue()


def rows(of):
    """A column of texts, and what it is known by."""
    return [f"{of} {i} {words(5, i)}" for i in range(12)]


def repository(files, columns):
    """A repository as hubs have them: the card names for each configuration and split the files, which lie there."""
    card = ["---", "license: cc-by-sa-3.0", "configs:"]
    content = {}
    for config, splits in files.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, (pattern, names) in splits.items():
            card += [f"  - split: {split}", f"    path: {pattern}"]
            content |= {name: parquet(text=rows(f"{config} {split} {name}"), **columns) for name in names}
    return content | {"README.md": "\n".join([*card, "---", ""]).encode()}


def splits(config, *, train=1):
    count = {"test": 1, "train": train, "validation": 1}
    return {
        name: (f"{config}/{name}-*", [f"{config}/{name}-{i:05d}-of-{n:05d}.parquet" for i in range(n)])
        for name, n in count.items()
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A stand-in with what lies on the real hub under the names of docs/data.md: configurations, splits, columns and
    places of files as they were seen there.
    """
    pytest.importorskip("datasets")
    wikitext = [f"wikitext-{name}-v1" for name in ("103", "103-raw", "2", "2-raw")]
    edu = {
        "default": {"train": ("data/*/*", ["data/CC-MAIN-2013-20/train-00000-of-00014.parquet"])},
        "sample-10BT": {"train": ("sample/10BT/*", ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"])},
    }
    wiki = {language: splits(language, train=2) for language in ("de", "en")}
    books = {f"plain_text/train/{i:04d}.parquet": parquet(text=rows(f"book {i}")) for i in range(2)}
    branches = {
        ("Salesforce/wikitext", "main"): repository({name: splits(name, train=2) for name in wikitext}, {}),
        ("google/wiki40b", "main"): repository(wiki, {"wikidata_id": ["Q1"] * 12, "version_id": ["1"] * 12}),
        ("HuggingFaceFW/fineweb-edu", "main"): repository(edu, {"id": ["a"] * 12, "int_score": [3] * 12}),
        ("bookcorpus/bookcorpus", "main"): {"README.md": b"", "bookcorpus.py": b"raise SystemExit('was run')"},
        ("bookcorpus/bookcorpus", "refs/convert/parquet"): {".gitattributes": b"", **books},
        ("owner/scripted", "main"): {"README.md": b"", "scripted.py": b"raise SystemExit('was run')"},
    }
    with served(branches, tmp_path_factory.mktemp("home")) as environment:
        yield environment


def asking(environment, *named):
    """Of each source its texts, or the one line that it is refused with, from a process of its own: `datasets` reads
    its environment when it is imported.
    """
    code = f"""
import json
from oasis_jax.data import sources
from oasis_jax.errors import UserError
found = []
for source in {named!r}:
    try:
        pieces = sources.pieces_of(source, "text")
        found.append([text.decode() for piece in pieces for text in piece.read("", "", None).documents])
    except UserError as error:
        found.append(str(error))
print("FOUND " + json.dumps(found))
"""
    root = str(pathlib.Path(sources.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root} | environment
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND ")), process.stderr


@pytest.mark.slow
def test_names_of_the_hub_are_what_lies_there(hub):
    files = lambda config, split, *names: [text for name in names for text in rows(f"{config} {split} {name}")]
    two = lambda config: [f"{config}/train-{i:05d}-of-00002.parquet" for i in range(2)]
    books = [*rows("book 0"), *rows("book 1")]
    raw = "wikitext-103-raw-v1"
    expected = {
        "hf:wikitext/wikitext-2-raw-v1": files("wikitext-2-raw-v1", "train", *two("wikitext-2-raw-v1")),
        f"hf:wikitext/{raw}:validation:text": files(raw, "validation", f"{raw}/validation-00000-of-00001.parquet"),
        f"hf:Salesforce/wikitext/{raw}": files(raw, "train", *two(raw)),
        "hf:wiki40b/en": files("en", "train", *two("en")),
        "hf:bookcorpus": books,
        "hf:bookcorpus/bookcorpus": books,
        "hf:fineweb-edu/sample-10BT": files(
            "sample-10BT", "train", "sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"
        ),
    }
    found, _ = asking(hub, *expected)
    assert dict(zip(expected, found)) == expected
    bad = {
        "hf:wikitext": "has several configurations; give hf:Salesforce/wikitext/NAME, where NAME is one of wikitext",
        "hf:wikitext/wikitext-2-raw": "(did you mean 'wikitext-2-raw-v1'?); allowed: wikitext-103",
        "hf:wiki40b/en:trian": "split: unknown name 'trian' (did you mean 'train'?); allowed: ",
        "hf:wiki40b/en:train:body": "column: unknown name 'body'; allowed: text, wikidata_id, version_id",
        "hf:bookcorpus/books": "configuration: unknown name 'books'; allowed: default",
        "hf:nobody/nothing": "cannot be read (Dataset 'nobody/nothing' doesn't exist on the Hub",
        "hf:owner/scripted": "scripted.py); give the files of its branch refs/convert/parquet",
    }
    found, _ = asking(hub, *bad)
    for (source, said), message in zip(bad.items(), found):
        assert said in message and message.startswith(f"--source {source}: ") and "network" not in message, message


@pytest.mark.slow
def test_without_a_network_a_local_way_is_named(hub, tmp_path):
    """What was fetched before is read; of the rest one line says what else can be given."""
    source = "hf:wikitext/wikitext-2-raw-v1"
    (fetched,), _ = asking(hub, source)
    (again, *messages), said = asking(
        hub | {"HF_HUB_OFFLINE": "1"}, source, "hf:wikitext/wikitext-2-v1", "hf:owner/name"
    )
    assert again == fetched
    for message in messages:
        assert "cannot be read (Couldn't " in message and "; without a network give files: --source 'DIR" in message
    assert "Retrying" not in said


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets; pip install 'oasis_jax\[hub\]'"):
        sources.pieces_of("hf:owner/name", "text")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(9):
        (folder / f"{i}.txt").write_text(words(200 + 37 * i, i))
    return folder


def test_processes_write_what_one_writes(texts, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, pattern=f"{texts}/*.txt", tokenizer="bpe", bpe_vocab_size=290)
    prepare.prepare(config, None, tmp_path / "one", shard_bytes=1500)
    said = []
    prepare.prepare(config, None, tmp_path / "two", shard_bytes=1500, workers=2, say=said.append)
    files = lambda out: {path.name: path.read_bytes() for path in out.iterdir()}
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "two")) > 9
    assert "100 % of the text, 0 s left" in said[-1]
    # An error of a process is the user's to read, and where the whole was stopped it goes on.
    (texts / "bad.txt").write_bytes(b"\0" * 9)
    flags = ["--source", f"{texts}/*.txt", "--tokenizer", "bytes", "--out", str(tmp_path / "bad"), "--workers", "2"]
    with pytest.raises(UserError, match=r"bad.txt' holds 9 NUL bytes and no text"):
        main(flags)
    main([*flags, "--set", "data.corrupt=skip"])
    assert "tokens to train on" in capsys.readouterr().out and verify(tmp_path / "bad") == 2
    (texts / "bad.txt").unlink()


@pytest.mark.slow
def test_workers_of_a_killed_preparation_leave(texts, tmp_path):
    """They would write beside the one that is started again."""
    code = f"""
from oasis_jax.config import DataConfig
from oasis_jax.data import prepare
if __name__ == "__main__":
    config = DataConfig(corpus="files", pattern={f"{texts}/*.txt"!r}, tokenizer="bytes")
    prepare.prepare(config, None, {str(tmp_path / "out")!r}, shard_bytes=10, workers=2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)])
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait = lambda done: next(i for i in range(600) if done() or time.sleep(0.05))
    wait(lambda: list((tmp_path / "out").glob("*.arrayrecord")))
    workers = children.read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = lambda pid: pathlib.Path(f"/proc/{pid}/stat")
    gone = lambda pid: not state(pid).exists() or state(pid).read_text().rpartition(")")[2].split()[0] == "Z"
    wait(lambda: all(map(gone, workers)))
    assert len(workers) >= 2
    # Started again, it repeats no shard that is there and gives what one that was never stopped gives.
    config = DataConfig(corpus="files", pattern=f"{texts}/*.txt", tokenizer="bytes")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.arrayrecord.json")}
    shards = {name: (tmp_path / "out" / name.removesuffix(".json")).stat().st_mtime_ns for name in kept}
    for out in ("out", "whole"):
        prepare.prepare(config, None, tmp_path / out, shard_bytes=10)
    assert shards == {name: (tmp_path / "out" / name.removesuffix(".json")).stat().st_mtime_ns for name in kept}
    files = lambda out: {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
    assert files("out") == files("whole") and kept


def test_processes_are_as_many_as_have_something_to_do_and_share_the_cores():
    """With threads for twice the cores, so that at the end one that still works has those of the others."""
    cores = len(os.sched_getaffinity(0))
    with Workers(3 * cores, "RAYON_NUM_THREADS") as pool:
        found = dict(pool.run(os.getenv, [("unset",)] * 2))
        assert len(multiprocessing.active_children()) == 2
    assert found == dict.fromkeys(range(2), str(cores))
