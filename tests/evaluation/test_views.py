"""What a report shows beside the measures, against numpy and by hand; and the page in a real browser."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from evaluation.toys import placed
from flax import nnx

from oasis_jax.config import Config, DataConfig, ModelConfig
from oasis_jax.data.tokenizers import BytesTokenizer
from oasis_jax.evaluation import DEFINITIONS
from oasis_jax.evaluation.interventions import Effect
from oasis_jax.evaluation.report import page as page_module
from oasis_jax.evaluation.report.comparison import TABLE, MeasuredRun, cell, change_text, interval_text
from oasis_jax.evaluation.report.markup import POLICY, document
from oasis_jax.evaluation.report.page import write_report
from oasis_jax.evaluation.report.sections import by_role
from oasis_jax.evaluation.report.views import EDGES, histogram, look
from oasis_jax.evaluation.report.words import summary
from oasis_jax.model.decoder import Decoder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_histogram_equals_numpy():
    random = np.random.default_rng(0)
    taps = [random.standard_normal((2, 7, 5)).astype(np.float32), random.standard_cauchy((2, 7, 5)).astype(np.float32)]
    taps[0][0, 0, 0] = 0
    edges = [0, *EDGES[1:-1], np.inf]
    for x in taps:
        expected = [np.histogram(np.abs(h) / np.sqrt((h.astype(float) ** 2).mean()), edges)[0] / h.size for h in x]
        np.testing.assert_allclose(histogram(x), expected, atol=1e-6)
        assert len(EDGES) == len(expected[0]) + 1


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "softpick"])
def test_tokens_carry_what_the_matrices_say(normalizer):
    config = ModelConfig(preset="residual", normalizer=normalizer, num_layers=2, width=12, num_heads=3, vocab_size=258)
    model, inputs = Decoder(config, rngs=nnx.Rngs(0)), np.array([[256, *b"def f(x"], [256, *b"return "]], np.int32)
    found = look(*placed(model), {"inputs": inputs}, BytesTokenizer())
    one_head, found = found["head"], found["tokens"]
    assert found["text"] == ["", *"def f(x"]
    received, null, heads = np.zeros(8), np.zeros(8), []
    for layer in model(inputs)[1].attention:
        scores = np.einsum("TNH,SNH->NTS", layer.query[0], layer.key[0]).astype(float) / 2
        e = np.where(np.tril(np.ones((8, 8))), np.exp(scores), 0)
        if normalizer == "softpick":
            lifted = np.where(np.tril(np.ones((8, 8))), e - 1, 0)
            p = np.maximum(lifted, 0) / np.maximum(np.abs(lifted).sum(-1, keepdims=True), 1e-9)
        else:
            p = e / ((normalizer == "softmax1") + e.sum(-1, keepdims=True))
        received += p.sum(1).mean(0) / np.arange(8, 0, -1) / 2
        heads.append(np.concatenate([p, np.maximum(1 - p.sum(-1, keepdims=True), 0)], -1))
        null += (1 - p.sum(-1)).mean(0) / 2
    np.testing.assert_allclose(found["received"], received, atol=1e-4)
    if normalizer == "softmax":
        assert found["null"] is None
    else:
        np.testing.assert_allclose(found["null"], null, atol=1e-4)
    strongest = max(np.ndindex(2, 3), key=lambda place: heads[place[0]][place[1], :, 0].mean())
    assert (one_head["layer"], one_head["head"]) == strongest
    np.testing.assert_allclose(one_head["rows"], heads[strongest[0]][strongest[1]], atol=1e-4)


def test_a_model_of_vectors_has_no_tokens():
    config = ModelConfig(preset="oasis", inputs="vectors", vector_dim=3, num_layers=1, width=12, num_heads=3)
    found = look(*placed(Decoder(config, rngs=nnx.Rngs(0))), {"inputs": np.ones((1, 5, 3), np.float32)}, None)
    assert found["tokens"] is None and set(found["histograms"]) == {"attention_output", "mlp_output", "layer_output"}


def test_roles_stand_for_layers_that_are_treated_alike():
    tensors = {"layer0.mlp.up": "a", "layer1.mlp.up": "a", "layer0.mlp.down": "a", "layer1.mlp.down": "b", "head": "b"}
    assert by_role(tensors) == {"layer*.mlp.up": "a", "layer0.mlp.down": "a", "layer1.mlp.down": "b", "head": "b"}


def test_changes_and_intervals_as_shown():
    nbsp = "\N{NO-BREAK SPACE}"
    assert [change_text(x) for x in (0.00012, -0.0123, 0.234, 2.5, None)] == [
        f"+0.012{nbsp}%",
        f"-1.23{nbsp}%",
        f"+23.4{nbsp}%",
        f"+250{nbsp}%",
        "–",
    ]
    assert interval_text((4.1234, 5.0)) == "4.123 to 5.000"
    assert interval_text((0.0, 0.0)) == interval_text(None) == ""


# Made-up runs, for the page


def made_up(label: str, preset: str, **changes) -> MeasuredRun:
    random = np.random.default_rng(len(label))
    share = lambda *shape: (random.random(shape) / 3).tolist()
    bins, null = len(EDGES) - 1, preset == "oasis"
    text = list('def f(x):\n    return "<b>&amp;" + x  # ä\n')
    metrics = dict.fromkeys(DEFINITIONS) | dict(
        perplexity=5.0 + len(label) / 9,
        max_inf_norm=10.0,
        avg_kurtosis=4.0,
        sink_rate=0.25,
        first_token_mass=0.2,
        null_mass=0.1 if null else None,
        first_token_mass_conditional=0.2 if null else None,
        first_token_mass_by_head=share(4, 5),
        null_mass_by_head=share(4, 5) if null else None,
    )
    view = {
        "edges": list(EDGES),
        "histograms": {kind: [1 / bins] * bins for kind in ("attention_output", "mlp_output", "layer_output")},
        "tokens": {"text": text, "received": share(len(text)), "null": share(len(text)) if null else None},
    }
    scheme = lambda change: {
        "value": None if change is None else 5 * (1 + change),
        "float": 5.0,
        "relative_change": change,
        "samples": {"sequences": 8},
        "interval": None if change is None else [change - 0.01, change + 0.02],
        "tensors": {"layer0.mlp.up": "weight int8", "head": "float"},
    }
    values = dict(
        label=label,
        workdir=f"runs/{label}",
        step=1,
        config=Config(model=ModelConfig(preset=preset), data=DataConfig()),
        corpus={"name": "stdlib", "sha256": "0" * 64},
        tokenizer={"kind": "bytes", "vocab_size": 258, "sha256": "1"},
        samples={"sequences": 8, "positions": 8 * 256},
        metrics=metrics,
        history=[],
        versions={"jax": "0"},
        view=view,
        absent={name: "not applicable: only for others" for name in ("null_mass", "beta") if not null},
        intervals={"perplexity": (4.9, 5.9)},
        interventions=[
            Effect("beta", reason="not applicable: only for others"),
            Effect("sources", "older", "mlp", "late", True, 0.4, 2.0, 0.1, (0.05, 0.2)),
        ],
        quantization={"w8a8": scheme(0.001), "w4a4_g32": scheme(0.2), "fp8": scheme(None)},
    )
    return MeasuredRun(**values | changes)


RUNS = [made_up("oasis", "oasis"), made_up("a_twin_with_a_rather_long_name", "attnres_cumulative")]


def test_what_does_not_apply_is_told_from_what_was_not_measured():
    null_mass = next(row for row in TABLE if row.name == "null_mass")
    assert [cell(null_mass, run) for run in RUNS] == ["0.100", "n/a"]
    assert cell(null_mass, RUNS[1]._replace(absent={})) == "–"


def test_words_about_quantization():
    nbsp = "\N{NO-BREAK SPACE}"
    text = summary(RUNS)
    assert (
        f"Quantization changes the perplexity of oasis by +0.10{nbsp}% (w8a8) to +20.0{nbsp}% (w4a4_g32); fp8 "
        "breaks it and" in text
    )
    one = RUNS[0]._replace(quantization={"w8a8": RUNS[0].quantization["w8a8"]})
    assert f"Quantization changes the perplexity by +0.10{nbsp}% (w8a8)." in summary([one])
    assert "Quantization" not in summary([RUNS[0]._replace(quantization={})])


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    assert write_report(RUNS, folder) == []
    return folder / "index.html"


def test_figures_are_png_and_svg(page):
    names = {path.stem for path in (page.parent / "figures").glob("*.png")}
    assert (
        names
        == {path.stem for path in (page.parent / "figures").glob("*.svg")}
        >= {"quantization", "tokens_received", "histograms"}
    )
    assert (page.parent / "figures" / "quantization.svg").read_text().count("<svg") == 1


def browse(page: pathlib.Path, folder: pathlib.Path, width: int, script: str) -> tuple[str, str]:
    """The title that a script of ours gives, and the browser's log, in which every request of the page is an error:
    none is allowed.

    The page stands in a frame of the width asked for, because a window is never narrower than 500 pixels.
    """
    copy = folder / "copy.html"
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    text = page.read_text().replace(POLICY, policy)  # for the script of ours
    inside = html.escape(text.replace("</body>", f"<script>{script}</script></body>"))
    copy.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe style="width:{width}px;height:800px;border:0" '
        f'srcdoc="{inside}"></iframe>'
    )
    return dom(copy, folder)


def dom(page: pathlib.Path, folder: pathlib.Path) -> tuple[str, str]:
    """The title of a page once it is loaded, and the browser's log."""
    quiet = (
        "background-networking",
        "component-update",
        "sync",
        "gpu",
        "default-apps",
        "extensions",
        "domain-reliability",
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        *(f"--disable-{name}" for name in quiet),
        "--no-first-run",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,900",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter,Translate",
        "--dump-dom",
        f"file://{page}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return html.unescape(re.search(r"<title>(.*?)</title>|$", done.stdout)[1] or ""), done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(page, tmp_path, width):
    measure = (
        "const small=[...document.querySelectorAll('main p, main td, main li')]"
        ".filter(e=>parseFloat(getComputedStyle(e).fontSize)<11).length;"
        "const e=document.documentElement;parent.document.title="
        "JSON.stringify([innerWidth,e.scrollWidth,small,document.querySelectorAll('svg').length]);"
    )
    title, log = browse(page, tmp_path, width, measure)
    inner, scroll, small, pictures = json.loads(title)
    assert inner == width and scroll <= width and small == 0
    assert pictures == page.read_text().count("<svg") > 5
    assert "CONSOLE" not in log, log


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_the_browser_check_sees_errors_and_requests(tmp_path):
    (tmp_path / "bad.html").write_text(document("bad", "<img src='http://127.0.0.1:9/x.png'>"))
    _, log = browse(tmp_path / "bad.html", tmp_path, 390, "console.error('oh no')")
    assert "oh no" in log and "CONSOLE" in log
    assert "http://127.0.0.1:9/x.png" in log and "Content Security Policy" in log


EVIL = (
    "</style></title></svg></td><script>parent.evil=1</script><img src=x onerror=parent.evil=2><a href=http://a.b>'\""
)
FOUND = (
    "parent.document.title=JSON.stringify([parent.evil||0,document.scripts.length,"
    "document.querySelectorAll('img[onerror],a[href^=http],iframe,object,embed,form,base').length,"
    "document.body.innerText.includes('parent.evil=1')])"
)


def hostile_runs() -> list[MeasuredRun]:
    """With markup in every text that a run's folder, its model or its corpus can bring."""
    run = made_up("oasis", "oasis")
    return [
        run._replace(
            label=EVIL + number,
            workdir=EVIL,
            corpus={"name": EVIL, "sha256": EVIL, "split": EVIL},
            tokenizer={"kind": EVIL, "vocab_size": 258, "sha256": EVIL},
            versions={"jax": EVIL, EVIL: "1"},
            notes=(EVIL,),
            absent={"null_mass": EVIL, "beta": EVIL},
            view=run.view | {"tokens": run.view["tokens"] | {"text": [EVIL] * len(run.view["tokens"]["text"])}},
            quantization={"w8a8": run.quantization["w8a8"] | {"tensors": {EVIL: EVIL}}},
            interventions=[Effect("beta", reason=EVIL)],
        )
        for number in ("", "2")
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_a_report_of_hostile_runs_is_inert_in_a_browser(tmp_path):
    """Every text is shown as text, also where the page's own policy, which forbids scripts, is taken away."""
    write_report(hostile_runs(), tmp_path)
    title, log = browse(tmp_path / "index.html", tmp_path, 1280, FOUND)
    assert json.loads(title) == [0, 1, 0, True]  # one script: the one that looks
    assert "CONSOLE" not in log, log


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_the_browser_check_sees_markup_that_got_through_and_the_policy_stops_it(tmp_path):
    (tmp_path / "bad.html").write_text(document("bad", EVIL))
    title, _ = browse(tmp_path / "bad.html", tmp_path, 390, FOUND)
    evil, scripts, others, _ = json.loads(title)
    assert evil > 0 and scripts == 2 and others == 2
    own = html.escape((tmp_path / "bad.html").read_text())
    (tmp_path / "kept.html").write_text(
        f'<title>-</title><iframe srcdoc="{own}" onload="document.title=String(window.evil||0)"></iframe>'
    )
    title, log = dom(tmp_path / "kept.html", tmp_path)
    assert title == "0" and "Content Security Policy" in log


def test_a_picture_that_fails_is_named_and_the_rest_is_there(tmp_path, monkeypatch):
    def save_all_but_one(picture, folder, save=page_module.save):
        if picture.name == "sink_mass":
            raise OSError(28, "No space left on device")
        return save(picture, folder)

    monkeypatch.setattr(page_module, "save", save_all_but_one)
    (problem,) = write_report(RUNS, tmp_path)
    assert problem == "picture sink_mass is left out: OSError: [Errno 28] No space left on device"
    page = (tmp_path / "index.html").read_text()
    assert html.escape(problem) in page and "Measures" in page
    assert len(list((tmp_path / "figures").glob("*.png"))) > 3


def test_a_picture_or_section_that_cannot_be_made_is_named_and_the_rest_is_there(tmp_path):
    """Numbers that no measure gives, in one place each."""
    broken = RUNS[0]._replace(
        view=RUNS[0].view | {"histograms": None},
        quantization=RUNS[0].quantization | {"w8a8": RUNS[0].quantization["w8a8"] | {"tensors": None}},
    )
    problems = write_report([broken, RUNS[1]], tmp_path)
    assert [problem.split(":")[0] for problem in problems] == [
        "picture histograms is left out", "the section 'quantization' is left out",
    ]  # fmt: skip
    page = (tmp_path / "index.html").read_text()
    assert all(html.escape(problem) in page for problem in problems)
    assert "Measures" in page and "Attention each token receives" in page
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} >= {"sink_mass", "quantization"}


def test_text_that_a_plot_library_reads_as_markup_is_shown_as_it_is(tmp_path):
    for label in ("$x$", r"$\frac{$", "a$b", "_hidden"):
        assert write_report([RUNS[0]._replace(label=label)], tmp_path) == []
        assert html.escape(label).replace("_", "_<wbr>") in (tmp_path / "index.html").read_text()
