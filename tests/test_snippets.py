"""Snippets of README and docs/ are executed: Python runs, and every command is read by its own parser: names of
configs, flags, fields, measures and schemes are there.
"""

import configparser
import contextlib
import importlib
import importlib.util
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import pytest
from documents import ROOT, Snippet, config_headers, pages, snippets
from pretrained.tiny import small_checkpoint
from programs import on_devices

import oasis_jax
from oasis_jax import load_pretrained
from oasis_jax.commands import COMMANDS
from oasis_jax.commands.config_file import load_config
from oasis_jax.config import sections
from oasis_jax.evaluation import choose
from oasis_jax.evaluation.quantization import parse_schemes
from oasis_jax.overrides import all_fields, apply_overrides
from oasis_jax.study import Study

SNIPPETS = snippets()
PYTHON = [x for x in SNIPPETS if x.language == "python"]
SHELL = [x for x in SNIPPETS if x.language in ("bash", "console")] + config_headers()
# Pages whose Python needs more than a tiny model, and the tests that execute it and look at what comes out.
ELSEWHERE = {
    "docs/measure.md": "tests/evaluation/test_library.py",
    "docs/quantization.md": "tests/evaluation/test_quantization.py",
    "docs/benchmarks.md": "tests/evaluation/test_strided_perplexity.py",  # and its harness in test_parity_lm_eval.py
}
# What stands for something else where one device is all there is.
SUBSTITUTES = {"MeshConfig(fsdp=4)": "MeshConfig(fsdp=1)"}
# Programs of others, of which only the syntax is checked, and why no more can be.
FOREIGN = {
    "gcloud": "needs an account; the command that it passes on is checked",
    "xprof": "a viewer, which is no dependency",
}


def test_every_snippet_says_its_language():
    unsaid = [str(x) for x in SNIPPETS if x.language not in ("python", "bash", "console", "text")]
    assert not [x for x in unsaid if "docs/api.md" not in x and "docs/definitions.md" not in x and "index.md" not in x]
    directives = {x.language for x in SNIPPETS if str(x) in unsaid}
    assert directives <= {"{eval-rst}", "{measures}", "{toctree}"}


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """What snippets of docs/pretrained.md take for granted: a model in FOLDER, and ids."""
    monkeypatch.chdir(tmp_path)
    folder = small_checkpoint(tmp_path / "FOLDER", "llama")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")

    return {
        "__name__": "snippet",
        "ids": jnp.zeros((1, 3), int),
        "model": load_pretrained("FOLDER"),
        "oasis_jax": oasis_jax,
    }


@pytest.mark.parametrize("snippet", [x for x in PYTHON if x.page not in ELSEWHERE], ids=str)
def test_python(snippet, names, capsys):
    source = snippet.text
    for there, here in SUBSTITUTES.items():
        source = source.replace(there, here)
    exec(compile(source, str(snippet), "exec"), names)
    promised = [line.split("#", 1)[1].strip() for line in source.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == promised
    if "get_study" in names:
        assert isinstance(names["get_study"](), Study)


def test_what_is_executed_elsewhere_is():
    executed = {x.page for x in PYTHON}
    assert executed >= ELSEWHERE.keys()
    for page, test in ELSEWHERE.items():
        text = (ROOT / test).read_text()
        assert f'"{pathlib.Path(page).name}"' in text and "exec(compile(" in text


# Commands


def words(text: str) -> list[list[str]]:
    """A shell's simple commands as lists of words, without comments, assignments in front and redirections."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.whitespace = True, " \t"
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|\n"):
            found.append([])
        elif word != "do" and not (not found[-1] and re.fullmatch(r"\w+=.*", word)):
            found[-1].append(word)
    return [command for command in found if command]


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """The commands of a block: of a console what stands behind the prompt."""
    text = snippet.text
    if importlib.util.find_spec("gcsfs") is None:  # without it a command says so, and nothing else of it is seen
        text = text.replace("gs://", "")
    if snippet.language == "console":
        text = "\n".join(line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ "))
    for line in text.replace("\\\n", " ").replace("$i", "0").splitlines():
        if not line.lstrip().startswith("#"):
            yield from words(line)


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_commands(snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    if snippet.language == "bash":
        assert subprocess.run(["bash", "-n"], input=snippet.text, text=True, capture_output=True).stderr == ""
    checked = [check(command) for command in commands(snippet)]
    assert any(checked), "nothing in it is known"


def check(command: list[str]) -> bool:
    """Whether the command is one of this project's that has all it names; False for what only carries one along."""
    while command and command[0] in ("srun", "mpirun", "-np", "4"):
        command = command[1:]
    head, *rest = command
    for part in re.findall(r"\$\((.*?)\)", " ".join(rest)):
        assert check(words(part)[0])
    if head in ("for", "done", "wait", "cd"):
        return False
    if head in FOREIGN:
        inner = [words(x.partition("=")[2]) for x in rest if x.startswith("--command=")]
        checked = [check(passed_on) for found in inner for passed_on in found]
        return any(checked)
    if head == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest), command
        return True
    if head == "oasis_jax":
        return check_command(rest[0], rest[1:])
    assert head == "python", command
    if rest[0] in ("train.py", "eval.py"):
        return check_command(rest[0].removesuffix(".py"), rest[1:])
    if rest[:2] == ["-m", "oasis_jax"]:
        return check_command(rest[2], rest[3:])
    if rest[:3] == ["-m", "pip", "install"]:
        return check_install(rest[3:])
    if rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), command
        return True
    return check_script(rest[0], rest[1:])


def check_command(name: str, argv: list[str]) -> bool:
    assert name in COMMANDS
    parser = importlib.import_module(f"oasis_jax.commands.{name.replace('-', '_')}").make_parser(name)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args, others = parser.parse_known_args(argv) if name == "lm-eval" else (parser.parse_args(argv), [])
    except SystemExit:
        raise AssertionError(f"{argv}: {said.getvalue()}") from None
    of_harness = {"--limit", "--include_path", "--output_path", "--log_samples"}
    assert {x.partition("=")[0] for x in others if x.startswith("-")} <= of_harness
    config = getattr(args, "config", None) or (args.source if name == "show" else None)
    known = {f"{section}.{field.name}" for section, _, field in all_fields()}
    assert {x.partition("=")[0] for x in getattr(args, "set", [])} <= known
    if config:
        apply_overrides(load_config(config), args.set)
    if measures := getattr(args, "measures", None):
        choose(measures.split(","))
    if schemes := getattr(args, "quantize", None):
        parse_schemes(schemes.split(","))
    return True


def check_install(what: list[str]) -> bool:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:^\.|oasis_jax)\[([\w,]+)\]", "\n".join(what), re.MULTILINE):
        assert set(extras.split(",")) <= set(parser["options.extras_require"]), what
    return True


def check_script(path: str, argv: list[str]) -> bool:
    text = (ROOT / path).read_text() + (ROOT / "benchmarks" / "_harness.py").read_text()
    assert all(f'"{x.partition("=")[0]}"' in text for x in argv if x.startswith("--")), argv
    return True


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_the_text_names_in_passing(page):
    """Commands, flags and fields between backticks, which may be given in part."""
    fields = {f"{section}.{field.name}" for section, _, field in all_fields()}
    for span in re.findall(r"`([^`\n]+)`", page.read_text()):
        named = re.findall(rf"\b((?:{'|'.join(sections())})\.\w+)=", span)
        assert set(named) <= fields, span
        found = re.match(r"(?:python )?(train|eval)\.py |(?:python -m )?oasis_jax ([a-z][a-z-]+)\b", span)
        if found:
            name = found[1] or found[2]
            assert name in COMMANDS, span
            parser = importlib.import_module(f"oasis_jax.commands.{name.replace('-', '_')}").make_parser(name)
            assert set(re.findall(r"(?<= )--[a-z0-9-]+", span)) <= {*parser._option_string_actions}, span
        elif found := re.match(r"make ([a-z-]+)$", span):
            assert re.search(rf"^{found[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), span


@pytest.mark.slow
def test_the_first_five_minutes(tmp_path):
    """What docs/index.md has one type, but for the installation, and with fewer steps."""
    (start,) = [x for x in SHELL if x.page == "docs/index.md"]
    short = "run.steps=4 --set optimizer.warmup_steps=2"
    fewer = {"run.steps=40": short, "run.eval_interval=20": "run.eval_interval=2", "--batches=2": "--batches=1"}
    text = start.text
    for there, here in fewer.items():
        assert there in text
        text = text.replace(there, here)
    environment = on_devices(1)
    for line in (lines := text.splitlines())[1:]:
        command = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, (line, done.stderr)
    assert lines[0].startswith("python -m pip install")
    assert (tmp_path / "runs/start_report/index.html").stat().st_size > 10_000 and "def " in done.stdout
