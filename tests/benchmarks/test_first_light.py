"""benchmarks/first_light.py at toy sizes: every part runs on a CPU; one that crashes or hangs loses only itself."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def first_light(on_path):
    """The script as a module."""
    return importlib.import_module("first_light")


def run(*command: str, timeout: float = 300):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)]),
    }
    options = dict(env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    return subprocess.run([sys.executable, *command], **options)


def lines_of(path: pathlib.Path) -> list[dict]:
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def fake(name: str, code: str, seconds: float = 20.0):
    first_light = importlib.import_module("first_light")
    return first_light.Part(name, seconds, None, command=(sys.executable, "-c", code))


def test_an_unknown_part_is_one_line_with_the_nearest_name():
    process = run("benchmarks/first_light.py", "--part", "corectness")
    assert process.returncode == 2 and not process.stdout
    (line,) = process.stderr.splitlines()
    assert "'corectness'" in line and "did you mean 'correctness'?" in line and "training:oasis_blocks" in line


def test_no_time_at_all_is_refused():
    process = run("benchmarks/first_light.py", "--minutes", "-1")
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "--minutes" in process.stderr


def test_parts_are_chosen_by_name_family_or_platform(first_light):
    names = lambda wanted, platform: [part.name for part in first_light.choose(first_light.PARTS, wanted, platform)]
    assert names(["training"], "cpu") == ["training:residual", "training:oasis", "training:oasis_blocks"]
    assert names(["correctness:cudnn"], "cpu") == ["correctness:cudnn"]
    assert names(["variants"], "cpu") == ["variants"]
    assert "correctness:cudnn" in names(None, "gpu") and "correctness:mosaic_tpu" not in names(None, "gpu")
    assert "correctness:cudnn" not in names(None, "cpu")
    beside = first_light.groups(first_light.choose(first_light.PARTS, None, "gpu"))
    assert [len(group) for group in beside] == [1, 4, 1, 1, 1, 1, 1, 1]
    # all limits but the last part's, which takes what is left, are within ten minutes with half a minute to spare
    assert sum(max(part.seconds for part in group) for group in beside[:-1]) <= 570


def test_a_crash_or_a_hang_loses_only_itself(first_light, tmp_path):
    out, mark = tmp_path / "lines.jsonl", tmp_path / "grandchild"
    sleeper = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    hang = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    hang += f"subprocess.Popen([sys.executable, '-c', {sleeper!r}]); time.sleep(60)"
    write = f'open({str(out)!r}, \'a\').write(\'{{"part": "good", "name": "a result"}}\\n\')'
    parts = [
        fake("crash", "import os; os.abort()"),
        fake("error", "raise ValueError('of the part')"),
        fake("hang", hang, seconds=2.0),
        fake("good", write),
    ]
    start = time.monotonic()
    assert not first_light.run_parts(parts, 10.0, out, toy=True)
    assert time.monotonic() - start < 30
    ends = {line["part"]: line for line in lines_of(out)}
    assert ends["crash"]["name"] == "failed" and ends["crash"]["exit"] == -6
    assert ends["error"]["name"] == "failed" and "ValueError: of the part" in ends["error"]["last_errors"][-1]
    assert ends["hang"]["name"] == "cut off"
    assert ends["good"]["name"] == "end" and {"part": "good", "name": "a result"} in lines_of(out)
    time.sleep(max(0.0, 5 - (time.monotonic() - start)))
    assert not mark.exists()  # what a part that hangs has started ends with it


def test_parts_without_time_left_are_said(first_light, tmp_path):
    out = tmp_path / "lines.jsonl"
    slow = fake("slow", "import time; time.sleep(60)", seconds=1.0)
    assert not first_light.run_parts([slow, fake("late", "")], 0.02, out, toy=True)
    assert [(line["part"], line["name"]) for line in lines_of(out)] == [("slow", "cut off"), ("late", "left out")]


def test_lines_are_json_whatever_they_hold(tmp_path):
    from _first_light.report import Report

    out = tmp_path / "lines.jsonl"
    report = Report(out, "part", 10.0)
    report.say(
        "odd", nan=float("nan"), infinite=[-float("inf")], number=np.float32(0.1), path=out, nested={1: (2, None)}
    )

    def fails():
        raise RuntimeError("two\nlines")

    report.attempt("fails", fails)
    odd, failed = lines_of(out)
    assert odd["nan"] == "nan" and odd["infinite"] == ["-inf"] and odd["nested"] == {"1": [2, None]}
    assert failed["failed"] == "RuntimeError: two\nlines"


def test_a_wrong_number_is_found():
    from _first_light.correctness import errors_of, relative_error

    x = {"x": jnp.arange(1.0, 7.0)}
    right = lambda arrays: {"output": arrays["x"] ** 2, "lse": jnp.full(3, -jnp.inf)}
    wrong = lambda arrays: {"output": arrays["x"] ** 2 + 0.1 * arrays["x"], "lse": jnp.full(3, -jnp.inf)}
    assert errors_of(right, right, x, x, "bfloat16")["ok"]
    found = errors_of(wrong, right, x, x, "bfloat16")
    assert found["wrong"] == ["output"]
    np.testing.assert_allclose(found["errors"]["output"], 0.6 / 36, rtol=1e-5)
    assert not errors_of(lambda x: {"output": jnp.full(6, jnp.nan), "lse": jnp.zeros(3)}, right, x, x, "bfloat16")["ok"]
    assert relative_error(np.zeros(3), np.zeros(4)) == np.inf


def test_a_variant_sets_a_constant_and_puts_it_back():
    from _first_light.variants import ATTENTION, CASES, VARIANTS, Variant, replaced

    from pallas_kernels.null_attention import mosaic_gpu

    as_set = mosaic_gpu._PROCESSORS
    with replaced(Variant("decode", ATTENTION, "_PROCESSORS", None, 7)):
        assert mosaic_gpu._PROCESSORS == 7
    assert as_set == mosaic_gpu._PROCESSORS
    with pytest.raises(LookupError, match="has no _GONE"), replaced(Variant("decode", ATTENTION, "_GONE", None, 7)):
        pass
    assert {variant.case for variant in VARIANTS} <= CASES.keys()


def test_facts_need_jax_flax_and_optax_alone(tmp_path):
    out = tmp_path / "lines.jsonl"
    assert bare_worker(out, "facts", "") == 0
    lines = {line["name"]: line for line in lines_of(out)}
    assert lines["machine"]["platform"] == "cpu"
    assert lines["explain attention, head size 128"]["runs"] == "xla"
    assert lines["explain depth route, 29 sources of 2048"]["runs"] == "xla"
    assert lines["peaks"]["copy_gb_per_s"] > 0


@pytest.mark.slow
def test_training_needs_jax_flax_and_optax_alone(tmp_path):
    out = tmp_path / "lines.jsonl"
    assert bare_worker(out, "training", "oasis_blocks") == 0
    (line,) = lines_of(out)
    assert line["ok"] and line["last_loss"] < line["first_loss"] and line["steps"] == 12


def bare_worker(out: pathlib.Path, module: str, argument: str) -> int:
    """A part in a process that can import none of the packages that the library needs beyond those."""
    absent = ["grain", "array_record", "tokenizers", "safetensors", "gguf", "matplotlib", "chex", "qwix", "jaxtyping"]
    arguments = [module, argument, "--part", module, "--seconds", "200", "--out", str(out), "--toy"]
    worker = str(BENCHMARKS / "_first_light" / "worker.py")
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); sys.argv[1:] = {arguments}; "
    process = run("-c", code + f"runpy.run_path({worker!r}, run_name='__main__')")
    assert not process.returncode, process.stderr[-3000:]
    return process.returncode


@pytest.mark.slow
def test_everything_runs_on_a_cpu(first_light, tmp_path):
    out = tmp_path / "lines.jsonl"
    process = run("benchmarks/first_light.py", "--out", str(out), "--minutes", "30", timeout=900)
    assert process.returncode == 0, process.stdout[-3000:]
    lines = lines_of(out)
    assert lines[0]["part"] == "begin" and lines[-1] == {"part": "end", "all_ended": True, "all_right": True}
    ended = {line["part"] for line in lines if line.get("name") == "end"}
    assert ended == {part.name for part in first_light.choose(first_light.PARTS, None, "cpu")}
    checked = [line for line in lines if "errors" in line]
    assert len(checked) >= 14 and all(line["ok"] for line in checked)
    assert any("both_speed_to_baseline" in line for line in lines)
    assert any("both_share_of_copy" in line for line in lines)
    # parts for other devices say why they do not run here
    for name in ("correctness:cudnn", "variants"):
        process = run("benchmarks/first_light.py", "--part", name, "--out", str(out))
        assert process.returncode == 0 and "refused" in process.stdout
