"""In a browser the report has no console error and nothing wider than a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import sweep
from launch.report.html import render
from launch.report.sweep_report import Board
from launch.trials.trial import Trial
from pruning import figures
from pruning.figures import LineSeries, Table

pytestmark = pytest.mark.slow

PHONE = 390  # pixels wide, as Chromium counts them for a page with a viewport
PROBE = """<p id="probe"></p><script>addEventListener("load", () => {
  const root = document.documentElement, width = root.clientWidth, scrolls = root.scrollWidth;
  const scrolling = (e) => /auto|scroll/.test(getComputedStyle(e).overflowX);
  const scrollable = (e) => e && (scrolling(e) || scrollable(e.parentElement));
  const sticksOut = (e) => e.getBoundingClientRect().right > width + 1 && !scrollable(e);
  const wide = [...document.querySelectorAll("body *")].filter(sticksOut).slice(0, 5);
  const found = [width, scrolls, wide.map((e) => e.outerHTML.slice(0, 99))];
  document.getElementById("probe").textContent = JSON.stringify(found);
});</script></body>"""


# Copies the probe's result out of the frame, where --dump-dom shows it.
COPY = """<script>addEventListener("load", () => setTimeout(() => {
  const frame = document.querySelector("iframe").contentDocument;
  const text = "probed " + frame.getElementById("probe").textContent;
  document.body.append(Object.assign(document.createElement("pre"), {textContent: text}));
}, 50));</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("needs a browser: chromium or google-chrome on the PATH")


def opened(chromium: str, page: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """Open a page in a frame as wide as a phone; return its DOM and the console's messages."""
    # A window is at least 500 pixels wide, a frame may be as narrow as a phone.
    frame = tmp_path / "frame.html"
    content = html.escape(page.read_text(encoding="utf-8").replace("</body>", PROBE), quote=True)
    frame.write_text(
        '<!doctype html><meta charset="utf-8">'
        f'<iframe width={PHONE} height=844 style="border:0" srcdoc="{content}"></iframe>{COPY}'
    )
    switches = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=5000",
    ]
    own = [f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", "--disable-dev-shm-usage"]
    done = subprocess.run(
        [chromium, *switches, *own, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def probed(
    chromium: str, text: str, tmp_path: Path, spoil: str = ""
) -> tuple[list[Any], list[str]]:
    """Return [width, scrolled width, elements that stick out] and the console's messages."""
    page = tmp_path / "report.html"
    page.write_text(text.replace("</main>", f"{spoil}</main>"), encoding="utf-8")
    dom, said = opened(chromium, page, tmp_path)
    found = re.search(r"<pre>probed (.*?)</pre>", dom, re.DOTALL)
    assert found, "the page's script did not run"
    return json.loads(html.unescape(found[1])), said


def of_method() -> list[figures.Figure]:
    """A figure of each type, with long names in them."""
    losses = {"phase 1": [3.0, 2.5, None, 2.2]}
    masks = [np.arange(9) % 2 == 0, np.arange(9) % 3 == 0]
    cells = [["0", 0.25, "z" * 120], ["1", 0.5, None]]
    return [
        LineSeries("Loss without each block", "block", "loss", losses, caption="c" * 200),
        figures.kept_map("heads", masks),
        Table("Allocation", ("block", "sparsity", "note"), cells, fractions=("sparsity",)),
    ]


SPEED = {"dense": 12345.0, "pruned": 23456.0, "speedup": 1.9}


def everything() -> dict[str, Any]:
    """A report with every part, and long names in them."""
    layers, name = (
        [f"model.layers.{i}" for i in range(12)],
        "/a/rather/long/directory/of/token/files/" + "x" * 60 + ".npy",
    )
    scores = {
        "dense": 8.125,
        "pruned": 19.375,
        "dense_stderr": 0.2,
        "pruned_stderr": 0.6,
        "tokens": 16_320,
    }
    kinds = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    got = {f"{layer}.{kind}": 0.1 * k for layer in layers for k, kind in enumerate(kinds)}
    return {
        "model": "/models/" + "y" * 80,
        "method": 'llmrank(scorer="wpr", gamma=0.5, theta=0.5, scope="local", units="neurons")',
        "settings": {"sparsity": 0.3, "output": name},
        "command": f"python -m launch.prune --model={name}",
        "protocol": {
            "name": "wanda2048",
            "source": "locuslab/wanda",
            "overridden": {"calibration": name},
            "calibration": {"source": name, "sha256": "c" * 64},
            "evaluation": {name: {"sha256": "d" * 64}},
            "tasks": {"hellaswag": {"documents": 100, "chance": 0.25}},
        },
        "sparsity": {
            "target": 0.3,
            "prunable": 0.2991,
            "total": 0.2,
            "per_linear": got,
            "asked": {n: 0.3 for n in got},
        },
        "parameters": {"dense": 1_234_567, "pruned": 987_654},
        "bytes": {"dense": 4_938_268, "pruned": 3_950_616},
        "perplexity": {
            name: scores,
            "c4": scores | {"pruned": float("inf"), "pruned_stderr": None},
        },
        "tasks": {
            "hellaswag": {
                "dense": {"acc": 0.5, "acc_stderr": 0.02},
                "pruned": {"acc": 0.26, "acc_stderr": 0.02},
            }
        },
        "draws": [{}, {}],
        "spread": {
            "perplexity": {name: {"mean": 19.4, "std": 0.3, "min": 19.2, "max": 19.6}},
            "tasks": {},
        },
        "seconds": {
            "load": 1.25,
            "calibrate_and_prune": 245.2,
            "draws": 240.0,
            "eval": 33.1,
            "export": 0.5,
        },
        "peak_memory_bytes": {"host": 3 * 2**30, "device": None},
        "scores": {
            "label": "PageRank",
            "per_linear": {n: [1e-5, 1e-4, 3e-4, 9e-4, 0.2] for n in got},
        },
        "samples": [
            {
                "prompt": "Once",
                "dense": "there was a cat",
                "pruned": "the the the the the the " + "z" * 200,
            }
        ],
        "warnings": ["w" * 200],
        "notes": ["n" * 200],
        "date": "2026-11-28T21:30:00+00:00",
        "loading": {
            "class": "PrunedForCausalLM",
            "model_type": "topiary_llama",
            "trust_remote_code": True,
            "tokenizer": True,
        },
        "speed": {
            "device": "d" * 60,
            "batches": {"1": dict.fromkeys(("prompt", "generation"), SPEED)},
        },
        "checks": {"topiary": True, "transformers": None},
        "load_back": {"topiary": "largest difference 0", "transformers": "not checked"},
        "details": {"removal_order": [3], "losses": [[3.0, 2.5, None, 2.2]], "note": "n" * 300},
        "figures": [figures.to_json(figure) for figure in of_method()],
    }


def test_a_report_has_no_console_error_and_fits_a_phone(chromium: str, tmp_path: Path) -> None:
    (width, scrolls, wide), said = probed(chromium, render(everything()), tmp_path)
    assert width <= PHONE and not said
    assert scrolls <= width and not wide, wide


def test_a_sweeps_page_has_no_console_error_and_fits_a_phone(
    chromium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = 'llmrank(scorer="wpr", gamma=0.5, theta=0.5, scope="local", units="neurons")'
    flags = [f"--model=/models/{'y' * 80}", f"--methods=wanda,{method}", "--sparsities=0.3,0.5"]
    values = sweep.options().parse(flags)
    trials = sweep.grid(values, tmp_path)
    board = Board(tmp_path, values, trials, [])
    monkeypatch.setattr(Trial, "report", lambda trial: everything() | {"spread": {}, "draws": []})
    for trial in trials[:-1]:
        board.update(trial)
    board.update(trials[-1], "it broke: " + "z" * 200)
    board.publish()
    text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    (width, scrolls, wide), said = probed(chromium, text, tmp_path)
    assert text.count("<svg") == 2, "curves and a front, and none of the collapsed data set"
    assert width <= PHONE and not said
    assert scrolls <= width and not wide, wide


def test_the_probe_finds_wide_elements_and_failing_scripts(chromium: str, tmp_path: Path) -> None:
    spoil = '<div style="width:600px">wide</div><script>nothing.such()</script>'
    (width, scrolls, wide), said = probed(chromium, render(everything()), tmp_path, spoil)
    assert (
        scrolls > width
        and any("600px" in w for w in wide)
        and any("nothing" in line for line in said)
    )
    assert "nothing" not in render(everything())
