"""Which files the `files` corpus reads, what it takes from .jsonl, and what it says about the ones it cannot read."""

import json
import os

import pytest

from oasis_jax.config import DataConfig
from oasis_jax.data import load_corpus
from oasis_jax.data.files import json_documents, matching_files
from oasis_jax.errors import UserError


def refusal(call, *arguments, **keywords):
    """The one line that the call stops with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def documents(content, tmp_path, key="text"):
    return json_documents(content, tmp_path / "a.jsonl", key)


def test_two_stars_match_folders_of_any_depth(tmp_path):
    (tmp_path / "one" / "two").mkdir(parents=True)
    for name in ["a.txt", "one/b.txt", "one/two/c.txt", "one/two/d.jsonl"]:
        (tmp_path / name).touch()
    found = matching_files(str(tmp_path / "**" / "*.txt"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == ["a.txt", "one/b.txt", "one/two/c.txt"]
    assert len(matching_files(str(tmp_path / "**"))) == 4


def test_jsonl_lines_are_documents(tmp_path):
    texts = ["first", "zwölf", "a\nline break", "😀"]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    content = ("\ufeff" + "\r\n".join(lines) + "\n\n  \n").encode()
    assert [document.decode() for document in documents(content, tmp_path)] == texts


def test_jsonl_documents_become_the_stream(tmp_path):
    lines = [json.dumps({"body": letter * 9}) for letter in "abcdefghij"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        corpus="files", pattern=str(tmp_path / "a.jsonl"), text_key="body", sequence_length=5, holdout_fraction=0.2
    )
    corpus = load_corpus(config, seed=0)
    streams = [corpus.tokenizer.decode(part.tokens).decode() for part in (corpus.train, corpus.heldout)]
    assert [sorted(set(stream)) for stream in streams] == [
        sorted(set("abcdefghij") - set(streams[1])),
        sorted(set(streams[1])),
    ]
    assert list(map(len, streams)) == [72, 18] and all(letter * 9 in "".join(streams) for letter in "abcdefghij")
    assert (corpus.train.tokens == corpus.tokenizer.separator_id).sum() == 7
    assert "18 of 90 bytes in 2 of 10 documents" in corpus.identity["split"]


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "open', "not valid JSON"),
        (b'["text"]', "got a list"),
        (b'{"txt": "a", "id": 3}', "did you mean 'txt'?); keys of this line: 'txt', 'id'"),
        (b"{}", "keys of this line: none"),
        (b'{"text": 5}', "'text' is not text but a int"),
        (b'{"text": null}', "'text' is not text but a NoneType"),
        (b'{"text": "\xe9"}', "not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path, line, said):
    message = refusal(documents, b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}', tmp_path)
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:3: ") and said in message


def test_no_match_names_the_folder_or_the_nearest_file(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "shakespeare.txt").touch()
    assert "has no 'corpsu' (did you mean 'corpus'?)" in refusal(matching_files, str(tmp_path / "corpsu" / "*.txt"))
    assert "(did you mean 'shakespeare.txt'?)" in refusal(matching_files, str(tmp_path / "corpus" / "shakespear.txt"))
    assert ".txt and .jsonl" in refusal(matching_files, str(tmp_path / "corpus" / "*.jsonl"))
    assert "it is a folder; add /*.txt" in refusal(matching_files, str(tmp_path / "corpus"))
    assert "has no 'x.txt'" in refusal(matching_files, str(tmp_path / "corpus" / "shakespeare.txt" / "x.txt"))


def test_a_relative_pattern_is_looked_up_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").touch()
    assert matching_files("*.txt") == [tmp_path / "b.txt"]
    assert f"{str(tmp_path)!r} has no 'texts'" in refusal(matching_files, "texts/*.txt")


def test_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.md").touch()
    message = refusal(matching_files, str(tmp_path / "*"))
    assert "b.md" in message and "neither .txt nor .jsonl" in message


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    config = DataConfig(corpus="files", pattern=str(tmp_path / "*.txt"))
    message = refusal(load_corpus, config, seed=0)
    assert "cannot read" in message and "gone.txt" in message and "No such file" in message


@pytest.mark.parametrize(
    "name", ["a[1]b", "a*b", "a?b", "a\\b", "$HOME", "a&b<c>", " a b ", "a\nb", "-a", os.fsdecode(b"a\xffb")]
)
def test_a_folder_or_file_is_meant_by_its_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "other").mkdir()
    for path in (folder / f"{name}.txt", folder / "2.txt", tmp_path / "other" / "3.txt"):
        path.write_text("plums")
    assert {path.name for path in matching_files(f"{folder}/*.txt")} == {f"{name}.txt", "2.txt"}
    assert matching_files(str(folder / f"{name}.txt")) == [folder / f"{name}.txt"]
    assert len(matching_files(f"{tmp_path}/*/*.txt")) == 3
