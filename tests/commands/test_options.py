"""Flags that several commands have: the help of --set, and the processes of one run."""

import dataclasses

import pytest

from oasis_jax.commands.options import (
    ProcessFlags,
    add_processes,
    add_set,
    describe_fields,
    join_processes,
    read_processes,
)
from oasis_jax.commands.parser import Parser
from oasis_jax.config import METHOD_FIELDS, PRESETS, sections
from oasis_jax.errors import UserError


def test_help_lists_every_field_with_type_default_and_help(capsys):
    parser = Parser(prog="x")
    add_set(parser, "another value")
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(["--help"])
    assert exit.value.code == 0
    rows = {
        line.split()[0]: line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ") and "." in line.split()[0]
    }
    for section, cls in sections().items():
        for field in dataclasses.fields(cls):
            name, kind, *rest = rows[f"{section}.{field.name}"]
            assert kind in ("int", "float", "bool", "str", "name", "table"), name
            assert rest, name
    assert rows["model.num_layers"][:5] == ["model.num_layers", "int", "4", "layers,", "each"]
    assert rows["model.tied_head"][:3] == ["model.tied_head", "bool", "true"]
    assert rows["optimizer.learning_rate"][:3] == ["optimizer.learning_rate", "float", "0.003"]
    for name in METHOD_FIELDS:
        assert rows[f"model.{name}"][2:5] == ["of", "the", "preset"]


def test_described_fields_are_wrapped_aligned_and_complete():
    text = describe_fields(100)
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].split()[0] == "model.preset"
    flat = " ".join(text.split())
    assert f"one of: {', '.join(PRESETS)}" in flat
    assert "one of: softmax, softmax1, learned_sink, " in flat
    assert "what is split over what; only in a config file" in flat
    assert "model.rope_scaling table none" in flat and "mesh.rules table a table" in flat
    starts = {
        line.index(line.split(maxsplit=3)[3])
        for line in text.splitlines()
        if line.lstrip().startswith(("run.", "optimizer."))
    }
    assert len(starts) == 1


def processes(*flags: str):
    parser = Parser(prog="x")
    add_processes(parser)
    return read_processes(parser, parser.parse_args(flags))


def test_processes_are_named_by_flags_or_by_the_scheduler():
    assert processes() is None
    assert processes("--distributed") == ("", 0, 0)
    assert processes("--coordinator=10.0.0.1:1234", "--processes=4", "--process=0") == ("10.0.0.1:1234", 4, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coordinator=a:1", "--processes=4"), "x: error: --coordinator, --processes: needs --process too"),
        (("--process=0",), "x: error: --process: needs --coordinator and --processes too"),
        (
            ("--distributed", "--coordinator=a:1", "--processes=4", "--process=0"),
            "x: error: --distributed: the scheduler says what --coordinator, --processes, --process would; give one or",
        ),
        (("--distributed", "--process=0"), "x: error: --distributed: the scheduler says what --process would;"),
        (("--processes=four",), "x: error: argument --processes: invalid int value: 'four'"),
    ],
)
def test_flags_of_processes_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        processes(*flags)
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("nowhere", 4, 0), "--coordinator: expected HOST:PORT of process 0, got 'nowhere'"),
        (("a:1", 0, 0), "--processes: must be at least 1, got 0"),
        (("a:1", 4, 4), "--process: must lie between 0 and 3 for --processes=4, got 4"),
    ],
)
def test_processes_that_cannot_be(flags, message):
    with pytest.raises(UserError) as caught:
        join_processes(ProcessFlags(*flags))
    assert str(caught.value) == message


def test_a_single_process_joins_nothing():
    join_processes(None)
