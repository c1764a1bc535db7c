"""The command line of studies: every study of the house can be built, and mistakes are one line."""

import subprocess
import sys

import pytest
from commands.test_config_file import ROOT, STUDIES, one_line

from oasis_jax.commands.study import load_study
from oasis_jax.errors import UserError
from oasis_jax.evaluation import choose
from oasis_jax.evaluation.interventions import choose as choose_interventions
from oasis_jax.evaluation.measures.table import DEFINITIONS
from oasis_jax.evaluation.quantization import parse_schemes
from oasis_jax.study import Study


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_studies_of_the_house_can_be_built_and_their_header_names_their_command(path):
    study = load_study(path)
    header = path.read_text().split('"""')[1]
    assert f"python -m oasis_jax study configs/{path.name} --out runs/{path.stem}" in header
    assert "Hardware: " in header
    for cell in study.cells():
        study.identity(cell)
    measured = choose(study.measures)
    choose_interventions(study.interventions, "interventions")
    schemes = parse_schemes(study.schemes)
    for outcome in study.outcomes:
        kind, _, rest = outcome.value.partition(".")
        if kind == "quantized":
            scheme, _, number = rest.rpartition(".")
            assert rest in schemes or (scheme in schemes and number in ("change", "nats", "d_sink"))
        elif kind != "without":
            assert any(outcome.value in evaluator.definitions for evaluator in measured.values())
            assert outcome.value in DEFINITIONS


def test_a_study_is_known_by_its_name_and_no_config_is_one():
    assert isinstance(load_study("study_trigger"), Study)
    assert load_study("study_trigger", seeds=2).seeds == (0, 1)
    with pytest.raises(UserError) as caught:
        load_study("demo")
    assert "STUDY: no file 'demo'" in one_line(caught) and "study_trigger" in one_line(caught)


def test_a_file_without_a_study_says_so():
    with pytest.raises(UserError, match=r"demo.py: has no function get_study\(\)"):
        load_study(ROOT / "configs" / "demo.py")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["study_trigger"], "one of the arguments --out --plan is required"),
        (["study_trigger", "--out="], "--out: names no folder"),
        (["study_trigger", "--out=x", "--workers=0"], "--workers: must be at least 1, got 0"),
        (["study_trigger", "--out=x", "--minutes=nan"], "--minutes: must be above 0, got nan"),
        (["study_trigger", "--out=x", "--seed=2"], "unknown flag --seed (did you mean '--seeds'?)"),
        (["study_trigger", "--out=x", "--methods=oasis,residul"], "unknown name 'residul' (did you mean 'residual'?)"),
        (["study_triger", "--out=x"], "did you mean 'study_trigger'?"),
        (["study_trigger", "--plan=h100:8", "--workers=2"], "--plan trains nothing"),
        (["study_trigger", "--out=x", "--report", "--methods=oasis"], "--report shows all cells"),
        (["study_trigger", "--out=x", "--report"], "--out: no cell of the study is done in 'x'"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path):
    command = [sys.executable, "-m", "oasis_jax", "study", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
