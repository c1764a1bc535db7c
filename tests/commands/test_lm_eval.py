"""`oasis_jax lm-eval` without the harness; with it: tests/pretrained/test_parity_lm_eval.py."""

import sys

import pytest

from oasis_jax.commands.lm_eval import main
from oasis_jax.commands.parser import run_main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=x", "--tasks=gsm8k"], "python -m pip install 'oasis_jax[lm-eval]'"),
        (["--model=x"], "the following arguments are required: --tasks"),
        (["--tasks=gsm8k"], "one of the arguments --model --workdir is required"),
        (["--model=x", "--tasks=gsm8k", "--device=cuda"], "--device=cuda: not here; what it would say is said by"),
        (["--model=x", "--tasks=gsm8k", "--dtype=float8"], "--dtype: must be float32 or bfloat16, got 'float8'"),
        (["--model=x", "--tasks=gsm8k", "--set=mesh.fdsp=2"], "did you mean 'mesh.fsdp'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "oasis_jax.evaluation.tasks.lm_eval", raising=False)
    with pytest.raises(SystemExit) as exit:
        run_main(main, arguments, "oasis_jax lm-eval")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said and said.count("\n") == 1
