"""A preparation that is killed again and again, whenever it may be, gives what one that was left alone gives."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from programs import end

from oasis_jax.data.prepared import verify

pytestmark = pytest.mark.faults

KILLS = 30
# Shards so small that a good part of the time goes into beginning and ending one.
SCRIPT = """
import sys
from oasis_jax.config import DataConfig
from oasis_jax.data import prepare
if __name__ == "__main__":
    config = DataConfig(corpus="files", pattern=sys.argv[1], tokenizer="bpe", bpe_vocab_size=300)
    prepare.prepare(config, None, sys.argv[2], shard_bytes=40_000, workers=2)
"""


@pytest.fixture
def start(tmp_path):
    """start(out) -> a preparation in a session of its own; what still runs at the end is killed."""
    (tmp_path / "texts").mkdir()
    random_words = np.random.default_rng(0)
    for i in range(24):
        words = random_words.choice(["pear", "fig", "zwölf", "漢字", f"x{i}"], 20_000)
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(" ".join(words))
    script, running = tmp_path / "script.py", []
    script.write_text(SCRIPT)

    def run(out) -> subprocess.Popen:
        command = [sys.executable, "-W", "error", script, f"{tmp_path}/texts/*.txt", out]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True))
        return running[-1]

    yield run
    end(running)


def test_killed_at_random_moments(start, tmp_path, record):
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    took = time.monotonic() - began
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    chance, out, kills, found = random.Random(seed), tmp_path / "out", 0, []
    while kills < KILLS:
        process = start(out)
        time.sleep(chance.uniform(0, 1.1 * took))
        # The process alone, whose workers have to leave by themselves, or all of them at once.
        (os.kill if chance.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:  # it was faster: from the start again
            for path in out.iterdir():
                path.unlink()
            continue
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        found.append(len(list(out.glob("*.arrayrecord.json"))) if out.exists() else 0)
    process = start(out)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    files = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files(out) == files(tmp_path / "whole")
    shards = verify(out)
    record(
        f"prepare: {kills} kills -9, {sum(0 < n < shards for n in found)} of them with some of {shards} shards "
        "written; the folder is bit by bit that of one that was left alone"
    )
