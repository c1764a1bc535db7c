"""Tasks in a report: from a checkpoint to metrics.json, the page and the terminal."""

import json

import numpy as np
import pytest
from pretrained.tiny import small_checkpoint

from oasis_jax.evaluation.report.task_scores import task_tables
from oasis_jax.evaluation.report.terminal import print_comparison
from oasis_jax.evaluation.runs import evaluate
from oasis_jax.evaluation.subjects import ModelOptions


@pytest.mark.slow
def test_scores_stand_beside_the_measures(tmp_path, capsys):
    source, random = small_checkpoint(tmp_path / "model", "llama"), np.random.default_rng(0)
    words = lambda count: " ".join(f"w{i}" for i in random.integers(0, 211, count))
    (tmp_path / "text.txt").write_text(words(900))
    lines = [json.dumps({"question": words(4), "answer": f"#### {n}"}) for n in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    options = ModelOptions(text=str(tmp_path / "text.txt"), length=9, num_batches=1, batch_size=2)
    settings = {"gsm8k_file": str(tmp_path / "test.jsonl"), "shots": 0, "max_new_tokens": 3}
    asked = dict(models=[str(source)], options=options, measures=["perplexity"], quantize=["w8a8"])
    runs = evaluate([], tmp_path / "report", tasks=["gsm8k"], task_settings=settings, **asked)
    (measured,) = json.loads((tmp_path / "report" / "metrics.json").read_text())["runs"].values()
    assert set(measured["tasks"]["gsm8k"]) == {"float", "w8a8"}
    for numerics, found in measured["tasks"]["gsm8k"].items():
        texts = (tmp_path / "report" / "gsm8k" / "model" / found["generations"]).read_text().splitlines()
        assert found["questions"] == 3 and len(texts) == 4 and f"{numerics}.jsonl" == found["generations"]
        right = [json.loads(text)["right"]["flexible"] for text in texts[1:]]
        assert found["scores"]["flexible"]["value"] == pytest.approx(sum(right) / 3)
        assert found["scores"]["strict"]["interval"] == pytest.approx([0, 0.5615], abs=1e-3)  # 0 of 3
    (table,) = task_tables(runs)
    assert [(row.model, row.numerics, row.questions) for row in table.rows] == [
        ("model", "float", 3),
        ("model", "w8a8", 3),
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "gsm8k, Pass@1 in per cent (0 worked examples; 1 a question)" in page and "0.0 to 56.1" in page
    print_comparison(runs)
    assert "gsm8k, Pass@1 in per cent" in capsys.readouterr().out
