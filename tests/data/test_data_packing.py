"""Documents in rows: every token once, none beside another document's, in order of nothing but the documents."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from evaluation.toys import build, placed
from sampling import sampled

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus, packing, prepare, train_batches
from oasis_jax.data.packing import PACKINGS, BestFitRows, GroupedTexts, SplitRows, Stream, best_fit, pack
from oasis_jax.data.text import stream_of
from oasis_jax.data.tokenizers import BytesTokenizer
from oasis_jax.errors import UserError
from oasis_jax.evaluation import choose, evaluate
from oasis_jax.model.context import Context
from oasis_jax.model.decoder import forward
from oasis_jax.model.layout import stack_layers

BEGIN, END = 256, 257


class NoSeparator(BytesTokenizer):
    def __init__(self):
        super().__init__()
        self.separator_id = None


def documents(seed=0, count=61, most=40):
    random = np.random.default_rng(seed)
    return [random.integers(1, 127, random.integers(1, most), np.uint8).tobytes() for _ in range(count)]


def rows_of(source):
    return [source[i] for i in range(len(source))]


def segments(row):
    """(inputs, targets, positions) of every document in a row; asserts that the rest has no weight."""
    counted = row["weights"] > 0
    found = []
    for number in dict.fromkeys(row["segment_ids"][counted].tolist()):
        here = (row["segment_ids"] == number) & counted
        assert np.flatnonzero(here).tolist() == list(range(here.argmax(), here.argmax() + here.sum()))  # in one piece
        found.append(tuple(row[name][here].tolist() for name in ("inputs", "targets", "positions")))
    assert not set(row["segment_ids"][~counted].tolist()) & set(row["segment_ids"][counted].tolist())
    return found


def slow_best_fit(sizes, length):
    """One after another, from the largest to the smallest."""
    rows, room = {}, []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [(space, row) for row, space in enumerate(room) if space >= sizes[i]]
        if not fitting:
            room.append(length)
            fitting = [(length, len(room) - 1)]
        _, rows[i] = min(fitting)
        room[rows[i]] -= sizes[i]
    return room


@pytest.mark.parametrize("length, count", [(7, 1), (16, 200), (64, 300), (5, 0)])
def test_best_fit_fills_rows_as_one_by_one_does(length, count):
    sizes = np.random.default_rng(count).integers(1, length + 1, count)
    rows = best_fit(sizes, length)
    filled = np.bincount(rows, weights=sizes, minlength=1) if count else np.zeros(0)
    assert (filled > 0).all() and (filled <= length).all()
    assert sorted(length - filled) == sorted(slow_best_fit(sizes, length))


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), NoSeparator()])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("kind", ["split", "best_fit"])
def test_every_document_is_there_once(kind, begin, tokenizer):
    """As its targets, in order: behind a begin token all of its tokens, else all but the first."""
    texts, length = documents(), 23
    source = PACKINGS[kind](stream_of(texts, tokenizer), length, BEGIN if begin else None)
    end = [] if tokenizer.separator_id is None else [END]
    ids = [[*text, *end] for text in texts]
    ids[-1] = list(texts[-1])
    pieces = [piece for row in rows_of(source) for piece in segments(row)]
    for inputs, targets, positions in pieces:
        assert positions == list(range(len(inputs)))
        assert inputs[1:] == targets[:-1] and (not begin or inputs[0] == BEGIN)
    if kind == "best_fit":
        # A document is cut where it is longer than a row, and only there.
        wanted = []
        for tokens in ids:
            inputs, targets = ([BEGIN, *tokens], tokens) if begin else (tokens, tokens[1:])
            for at in range(0, len(targets), length):
                first = [BEGIN] if begin else [inputs[at]]
                wanted.append(
                    (first + inputs[at + 1 : at + length][: len(targets) - at - 1], targets[at : at + length])
                )
        assert sorted((inputs, targets) for inputs, targets, _ in pieces) == sorted(wanted)
        assert len(source) <= 1.1 * sum(len(targets) for _, targets in wanted) / length + 1
    else:
        targets = [token for _, some, _ in pieces for token in some]
        wanted = [token for tokens in ids for token in (tokens if begin else tokens[1:])]
        assert targets == wanted[: len(targets)] and len(wanted) - len(targets) == len(wanted) % length < length
        assert all((row["weights"] == 1).all() for row in rows_of(source))


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), NoSeparator()])
def test_grouped_texts_are_those_of_run_clm(monkeypatch, begin, tokenizer):
    monkeypatch.setattr(packing, "TEXTS_OF_A_GROUP", 9)
    texts, length = documents(most=12), 17
    wanted = []
    for start in range(0, len(texts), 9):
        joined = [token for text in texts[start : start + 9] for token in [*([BEGIN] if begin else []), *text]]
        wanted += [joined[i : i + length] for i in range(0, len(joined) // length * length, length)]
    source = GroupedTexts(stream_of(texts, tokenizer), length, BEGIN if begin else None)
    rows = rows_of(source)
    assert [row["inputs"].tolist() for row in rows] == wanted and len(wanted) > 7
    for row in rows:
        assert row["targets"][:-1].tolist() == row["inputs"][1:].tolist()
        assert row["weights"].tolist() == [1] * (length - 1) + [0]


def test_no_documents_and_documents_of_nothing():
    for kind in ("split", "best_fit", "group_texts"):
        assert len(PACKINGS[kind](stream_of([], BytesTokenizer()), 5, BEGIN)) == 0
    # Texts of which a tokenizer leaves nothing, as sentencepiece does of blanks.
    stream = Stream(np.array([1, 2, 3], np.uint16), lambda: np.array([0, 2, 0, 1, 0]), NoSeparator())
    assert [row["targets"].tolist() for row in rows_of(BestFitRows(stream, 3, BEGIN))] == [[1, 2, 3]]
    assert [row["segment_ids"].tolist() for row in rows_of(SplitRows(stream, 3, BEGIN))] == [[1, 1, 2]]
    assert [row["inputs"].tolist() for row in rows_of(SplitRows(stream, 1, None))] == [[1]]
    with pytest.raises(IndexError):
        SplitRows(stream, 3, BEGIN)[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(documents(seed=1, count=90)):
        (folder / f"{i:02d}.txt").write_bytes(text + b"%d" % i)
    return DataConfig(corpus="files", pattern=f"{folder}/*.txt", sequence_length=19, batch_size=4, holdout_fraction=0.3)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "first"
    prepare.prepare(config, None, out, shard_bytes=400)
    return out


@pytest.mark.parametrize("kind", PACKINGS)
def test_prepared_shards_give_the_rows_of_the_files(config, folder, kind):
    config = dataclasses.replace(config, packing=kind)
    files = load_corpus(config, seed=0)
    prepared = load_corpus(dataclasses.replace(config, corpus="prepared", pattern=str(folder)), seed=0)
    for part in ("train", "heldout"):
        ours, theirs = rows_of(getattr(prepared, part)), rows_of(getattr(files, part))
        assert len(ours) == len(theirs) > 2
        for one, other in zip(ours, theirs):
            assert one.keys() == other.keys()
            assert all(one[name].tolist() == other[name].tolist() for name in one)


@pytest.mark.parametrize("kind", ["split", "best_fit"])
def test_a_stopped_run_goes_on_bit_by_bit_on_another_number_of_hosts(config, kind):
    """The row that a worker had begun when the run was stopped included."""
    config = dataclasses.replace(config, packing=kind)
    source = load_corpus(config, seed=0).train
    whole = train_batches(source, config, seed=3)
    straight = [next(whole) for _ in range(3 * len(source) // 4)]
    whole.close()
    first = train_batches(source, config, seed=3)
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    hosts = [train_batches(load_corpus(config, seed=0).train, config, seed=3, part=p, parts=2) for p in range(2)]
    for host in hosts:
        host.set_state(state)
    for expected in straight[5:]:
        parts = [next(host) for host in hosts]
        for name, value in expected.items():
            assert (
                value[0::2].tobytes() == parts[0][name].tobytes() and value[1::2].tobytes() == parts[1][name].tobytes()
            )
    for host in hosts:
        host.close()
    # An epoch has every row once.
    read = [row.tobytes() for batch in straight for row in batch["targets"]][: len(source)]
    assert sorted(read) == sorted(row["targets"].tobytes() for row in rows_of(source))


@pytest.mark.parametrize("kind", ["split", "best_fit"])
def test_what_a_row_holds_beside_a_document_changes_nothing_of_it(config, kind):
    """Through the model: logits of one document, whatever the others are."""
    model = build(preset="oasis", vocab_size=258)
    row = next(
        r
        for r in rows_of(load_corpus(dataclasses.replace(config, packing=kind), seed=0).train)
        if r["segment_ids"].max() > 2
    )
    mine = row["segment_ids"] == 2
    other = row | {"inputs": np.where(mine, row["inputs"], (row["inputs"] + 7) % 200).astype(np.int32)}
    params = stack_layers(model.parameters())
    run = jax.jit(lambda inputs, context: forward(params, model.config, inputs, context)[0][0])
    context = Context(row["positions"][None], row["segment_ids"][None])
    logits = [np.asarray(run(r["inputs"][None], context)) for r in (row, other)]
    assert np.array_equal(logits[0][mine], logits[1][mine]) and not np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("preset", sampled(["oasis", "residual", "attnres"], now=["oasis"]))
def test_packed_rows_have_the_loss_of_the_documents(preset):
    texts = documents(seed=2, count=23, most=14)
    model, tokenizer = build(preset=preset, vocab_size=258), BytesTokenizer()
    stream = stream_of(texts, tokenizer)
    rows = rows_of(BestFitRows(stream, 31, BEGIN))
    assert max(row["segment_ids"].max() for row in rows) > 2
    packed = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    # Each document in a row of its own, without segments or positions.
    apart = []
    for inputs, targets, _ in [piece for row in rows for piece in segments(row)]:
        fill = [0] * (31 - len(inputs))
        apart.append((inputs + fill, targets + fill, [1.0] * len(inputs) + [0.0] * len(fill)))
    unpacked = {
        name: np.array(values, np.float32 if name == "weights" else np.int32)
        for name, values in zip(("inputs", "targets", "weights"), zip(*apart))
    }
    assert unpacked["weights"].sum() == packed["weights"].sum()
    losses = [evaluate(*placed(model), [batch], choose(["perplexity"])).values["loss"] for batch in (packed, unpacked)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


# Mixtures


@pytest.fixture(scope="module")
def second(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    for i, text in enumerate(documents(seed=4, count=70)):
        (folder / f"{i:02d}.txt").write_bytes(bytes(byte % 100 for byte in text) + b"second %d" % i)
    out = tmp_path_factory.mktemp("made") / "second"
    prepare.prepare(dataclasses.replace(config, pattern=f"{folder}/*.txt"), None, out)
    return out


def mixture(config, first, second, weights, **fields):
    pattern = f"{first}, {second}"
    return dataclasses.replace(
        config, corpus="prepared", pattern=pattern, mixture=weights, packing="best_fit", **fields
    )


def test_a_mixture_has_its_shares_and_epochs_of_each(config, folder, second):
    asked = mixture(config, folder, second, "3,1")
    corpus = load_corpus(asked, seed=0)
    single = [load_corpus(dataclasses.replace(asked, pattern=str(out), mixture=""), seed=0) for out in (folder, second)]
    kinds = [{row["targets"].tobytes() for row in rows_of(one.train)} for one in single]
    batches = train_batches(corpus.train, asked, seed=1)
    read = [row.tobytes() for _ in range(2 * len(single[0].train) // 3) for row in next(batches)["targets"]]
    batches.close()
    own = [[row for row in read if row in kind] for kind in kinds]
    assert len(own[0]) + len(own[1]) == len(read) and len(own[0]) == 3 * len(own[1])
    for rows, kind in zip(own, kinds):
        epoch = rows[: len(kind)]
        assert len(set(epoch)) == len(epoch)  # none twice before all were there once
    assert set(own[0]) == kinds[0] and own[0][: len(kinds[0])] != own[0][len(kinds[0]) : 2 * len(kinds[0])]
    heldout = [row["targets"].tobytes() for row in rows_of(corpus.heldout)]
    assert len(set(heldout)) == len(heldout) > 3 and not set(heldout) & (kinds[0] | kinds[1])
    assert corpus.identity["shares"] == [0.75, 0.25] and corpus.identity["sha256"]


def test_a_mixture_goes_on_where_it_was(config, folder, second):
    asked = mixture(config, folder, second, "0.7,0.3")
    batches = train_batches(load_corpus(asked, seed=0).train, asked, seed=1)
    straight = [next(batches)["targets"].tobytes() for _ in range(12)]
    batches.close()
    again = train_batches(load_corpus(asked, seed=0).train, asked, seed=1)
    again.set_state({"next_index": 7})
    assert [next(again)["targets"].tobytes() for _ in range(5)] == straight[7:]
    again.close()


@pytest.mark.parametrize(
    "weights, message",
    [
        ("1", "1 weights for the 2 folders"),
        ("1,0", "numbers above 0 with commas between, such as 0.7,0.3, got '1,0'"),
        ("a,b", "got 'a,b'"),
        ("nan,1", "got 'nan,1'"),
    ],
)
def test_wrong_weights_are_refused(config, folder, second, weights, message):
    with pytest.raises(UserError) as caught:
        load_corpus(mixture(config, folder, second, weights), seed=0)
    assert message in str(caught.value)


def test_folders_of_two_tokenizers_are_refused(config, folder, tmp_path):
    asked = dataclasses.replace(config, tokenizer="bpe", bpe_vocab_size=280)
    prepare.prepare(asked, None, tmp_path / "bpe")
    with pytest.raises(
        UserError, match=r"bpe' was prepared with bpe, sha256 [0-9a-f]+; this run reads bytes, sha256 [0-9a-f]+"
    ):
        load_corpus(mixture(config, folder, tmp_path / "bpe", "1,1"), seed=0)


def test_packing_goes_with_text():
    for corpus in ("trigger", "backcopy", "pairs"):  # whose examples are what they are
        with pytest.raises(UserError, match=r"data\.packing: goes with corpus=stdlib, files, prepared, got corpus="):
            DataConfig(corpus=corpus, pattern="*.jsonl", packing="split")
    with pytest.raises(UserError, match=r"data\.mixture: goes with corpus=prepared"):
        DataConfig(mixture="1,1")
    stream = stream_of([b"abc"], BytesTokenizer())
    assert type(pack(stream, DataConfig(packing="split"))) is SplitRows
    assert jax.tree.structure(pack(stream, DataConfig(sequence_length=3))[0]).num_leaves == 3
