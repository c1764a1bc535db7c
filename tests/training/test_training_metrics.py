"""metrics.jsonl, TensorBoard files, speed and progress."""

import json
import os
import sys

import numpy as np
import pytest

from oasis_jax.errors import UserError
from oasis_jax.training.metrics import MetricsWriter, ProgressBar, Speed, read_metrics


def steps(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def test_lines_are_readable_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path, step=0, tensorboard=False) as writer:
        writer.write(1, {"loss": 0.1 + 0.2})
        (line,) = read_metrics(tmp_path)
        assert (line["step"], line["loss"]) == (1, 0.1 + 0.2)
        writer.write(2, {"loss": 1.5, "eval/loss": 1.25})
    assert read_metrics(tmp_path)[1]["eval/loss"] == 1.25
    assert all(line["time"] > 1.7e9 for line in read_metrics(tmp_path))


def test_resuming_drops_later_and_broken_lines(tmp_path):
    with MetricsWriter(tmp_path, step=0, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo\xff')
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, step=3, tensorboard=False) as writer:
        writer.write(4, {"loss": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss"] == 2.0


FOREIGN = [
    '{"step": "x", "loss": 1}',
    '{"step": null}',
    '{"step": true}',
    '{"step": 1e3}',
    '{"step": -1}',
    '{"step": 1' + "0" * 500 + "}",
    "[1]",
    "3",
    "[" * 100_000,
    "\x1b[31m",
]


def test_what_another_hand_wrote_is_skipped(tmp_path):
    """Lines that are none, and values that are no numbers; a run goes on behind them."""
    own = '{"step": 2, "loss": 1.5, "name": "<b>", "much": 1' + "0" * 500 + ', "list": [1], "gone": NaN}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*FOREIGN, own]) + "\n")
    (line,) = read_metrics(tmp_path)
    assert np.isnan(line.pop("gone")) and line == {"step": 2, "loss": 1.5}
    with MetricsWriter(tmp_path, step=2, tensorboard=False) as writer:
        writer.write(3, {"loss": 1.0})
    assert steps(tmp_path) == [2, 3]


def test_a_folder_in_place_of_metrics_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: is no file but a folder"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.partial"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with MetricsWriter(tmp_path, step=0, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert (tmp_path / "precious").read_text() == "mine" and steps(tmp_path) == [1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    words, writer = (
        r"cannot be written at step 1: No space left on device$",
        MetricsWriter(tmp_path, step=0, tensorboard=False),
    )
    writer._file.close()
    writer._file = open("/dev/full", "a")  # noqa: SIM115 (the writer closes it)
    with pytest.raises(UserError, match=words), writer:
        writer.write(1, {"loss": 1.0})


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"run\.tensorboard: tensorboardX is not installed.*oasis_jax\[tensorboard\]"):
        MetricsWriter(tmp_path, step=0, tensorboard=True)


@pytest.mark.filterwarnings("default")  # those of tensorboardX and protobuf
def test_tensorboard_files_hold_the_values(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, step=0, tensorboard=True) as writer:
        writer.write(7, {"loss": 1.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_speed_leaves_pauses_out(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    speed = Speed(tokens_per_step=100)
    nothing = dict.fromkeys(("data_share", "transfer_share", "device_share"), 0.0)
    now = 50.0  # compilation
    assert speed.read(1) == {}
    speed.restart(1)
    now += 2.0
    assert speed.read(5) == {"tokens_per_second": 200.0, "step_seconds": 0.5} | nothing
    now += 1.0
    assert speed.read(6) == {"tokens_per_second": 100.0, "step_seconds": 1.0} | nothing


def test_speed_says_where_the_time_went_and_what_share_of_the_peak_was_used(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    speed = Speed(tokens_per_step=100, flops_per_token=3.0, peak_flops=1000.0)
    nothing = dict.fromkeys(("data_share", "transfer_share", "device_share"), 0.0)
    speed.restart(0)
    for _ in range(4):
        with speed.spending("data"):
            now += 0.25
        now += 0.75
    assert speed.read(4) == {"tokens_per_second": 100.0, "step_seconds": 1.0, "mfu": 0.3} | nothing | {
        "data_share": 0.25
    }
    now += 2.0
    assert speed.read(5) == {"tokens_per_second": 50.0, "step_seconds": 2.0, "mfu": 0.15} | nothing


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ProgressBar(steps=1000, tokens_per_step=10) as bar:
        bar.say("[bold]as it is[/bold]")
        for step in range(1, 1001):
            now += 0.1
            bar.update(step, {"loss": 2.5, "tokens_per_second": 100.0} if step > 1 else {"loss": 2.5})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "[bold]as it is[/bold]"
    assert 5 < len(said) < 15
    assert said[-1] == "step 1000/1000  loss 2.5000  100 tokens/s  0:00:00 left"
    assert "loss 2.5000  100 tokens/s  0:01:" in said[1]
