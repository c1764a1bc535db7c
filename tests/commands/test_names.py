"""Every command with folders and files whose names hold what a name may hold."""

import json
import os
import pathlib

import jax
import pytest

from oasis_jax.__main__ import main
from oasis_jax.training.metrics import read_metrics

CONFIG = """
from oasis_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from oasis_jax.study import Outcome, Study

def get_config():
    return Config(
        model=ModelConfig(preset="oasis", num_layers=1, width=16, num_heads=2, mlp_dim=24),
        data=DataConfig(corpus="files", pattern=PATTERN, sequence_length=16, batch_size=2, holdout_fraction=0.3),
        optimizer=OptimizerConfig(warmup_steps=1),
        run=RunConfig(steps=2, telemetry_interval=0, eval_batches=1),
    )

def get_study():
    return Study(
        title="names", base=get_config(), methods={"oasis": ()}, seeds=(0,), claims=(),
        measures=("perplexity",), eval_batches=1, outcomes=(Outcome("perplexity", "perplexity"),),
    )
"""
ODD = b"-- [a]*?\\$x$&<b>'\";\t\x1b[31m\n \xe2\x80\xae.txt"  # marks of globs, shells, markup, terminals; a turned text
NAMES = {
    "odd": ODD,
    "no UTF-8": b"\xff[\xfe]*\xe4",
    "dashes": b"--workdir=x",
    "255 bytes": b"\xc3\xa9" * 120 + b"[x]* - $a$ <i>\\",
}


def run(capsys, *argv: str) -> tuple[str, str]:
    """What a command says on stdout and stderr, where it ends well."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    assert "\x1b[31m" not in out + err and "\u202e" not in out + err and "Traceback" not in err
    return out, err


@pytest.fixture
def kept_programs(tmp_path):
    """What is compiled for one name serves the others."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path.parent / "programs"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_any_name(name, tmp_path, monkeypatch, capsys, kept_programs):
    """Trained, resumed, evaluated, reported, continued, scored, exported, prepared, studied, shown: all below a folder
    of that name, in a folder of that name.
    """
    assert max(map(len, NAMES.values())) == 255
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(NAMES[name])
    here = pathlib.Path(odd)
    (here / "text").mkdir(parents=True)
    for i in range(3):
        (here / "text" / f"{i}{odd}"[:60]).with_suffix(".txt").write_text("one two three four " * 60 + f"{i}\n")
    pattern, workdir = f"{odd}/text/*.txt", str(here / odd)
    config = pathlib.Path("config.py")
    config.write_text(CONFIG.replace("PATTERN", repr(pattern)))
    train = ["train", "--config=config.py", f"--workdir={workdir}", f"--set=data.pattern={pattern}"]

    run(capsys, *train)
    _, said = run(capsys, *train, "--set=run.steps=3")
    assert "resumed at step 2" in said and [line["step"] for line in read_metrics(workdir)] == [1, 2, 3]
    report = here / f"{odd[:-1]}r"
    out, _ = run(capsys, "eval", f"--workdir={workdir}", f"--report={report}", "--measures=perplexity", "--batches=1")
    found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    assert found["complete"] and len(found["runs"]) == 1 and "report: " in out
    assert "<b>'" not in (report / "index.html").read_text(encoding="utf-8")
    assert (report / "figures").is_dir()
    out, _ = run(capsys, "generate", f"--workdir={workdir}", "--max-new-tokens=2", "one")
    assert out.startswith("one")
    text = next((here / "text").iterdir())
    numbers = here / "numbers.json"
    score = ["perplexity", f"--workdir={workdir}", f"--text={text}", f"--out={numbers}", "--window=8", "--stride=4"]
    run(capsys, *score)
    assert json.loads(numbers.read_text())["tokens"] > 1
    exported = here / "exported" / odd
    run(capsys, "export", f"--out={exported}", "--", workdir)
    run(capsys, "generate", f"--model={exported}", "--max-new-tokens=2", "one")
    run(capsys, "show", "--", workdir)
    prepared = here / "prepared"
    prepare = [f"--source={pattern}", "--tokenizer=bytes", f"--out={prepared}", "--set=data.holdout_fraction=0.3"]
    run(capsys, "prepare", *prepare, "--workers=1")
    run(capsys, "prepare", "--verify", f"--out={prepared}")
    on_shards = ["--set=data.corpus=prepared", f"--set=data.pattern={prepared}", "--set=run.steps=1"]
    run(capsys, "train", "--config=config.py", f"--workdir={here / 'on shards'}", *on_shards)
    run(capsys, "study", "config.py", f"--out={here / 'study'}")
    run(capsys, "study", "config.py", f"--out={here / 'study'}", "--report")
    assert (here / "study" / "index.html").exists()


@pytest.mark.parametrize(
    "argv",
    [["train", "--config=demo", "--workdir="], ["eval", "--workdir=", "--report=x"],
     ["eval", "--workdir=x", "--report="], ["generate", "--workdir=", "a"],
     ["perplexity", "--workdir=", "--text=a", "--window=8", "--stride=4"],
     ["export", "x", "--out="], ["prepare", "--source=a", "--tokenizer=bytes", "--out="],
     ["study", "study_trigger", "--out="]],
    ids=lambda argv: f"{argv[0]} {next(x for x in argv if x.endswith('='))}",
)  # fmt: skip
def test_an_empty_name_is_refused(argv, tmp_path, monkeypatch, capsys):
    """As an unset variable of a shell leaves it; it would mean the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(argv)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "names no folder; for the current one write ." in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
