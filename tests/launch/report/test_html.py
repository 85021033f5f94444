"""The HTML report: complete, escaped, self-contained, well-formed, the same bytes each time, and unmoved by odd figures."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from launch.report import plots
from launch.report.html import expectation, flat, render, write_html

VOID = {"meta", "link", "br", "img", "input", "hr"}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def make_report(blocks: int = 3) -> dict[str, Any]:
    layers = [f"model.layers.{i}" for i in range(blocks)]
    got = {
        f"{layer}.{kind}": 0.0 if kind in ATTENTION else 0.2997
        for layer in layers
        for kind in ATTENTION + MLP
    }
    return {
        "model": "embedded:tiny-llama",
        "method": 'llmrank(scorer="wpr")',
        "settings": {
            "sparsity": 0.3,
            "mesh": None,
            "output": "/out/pruned",
            "pattern": "unstructured",
        },
        "command": "python -m launch.prune --model=embedded:tiny-llama '--method=llmrank(scorer=\"wpr\")' --sparsity=0.3",
        "protocol": {
            "calibration": {
                "source": "embedded",
                "sha256": "c0ffee",
                "samples": 33,
                "length": 129,
                "seed": 17,
            },
            "evaluation": {
                "ptb": {"source": "ptb.npy", "sha256": "beef", "samples": 61, "length": 257}
            },
            "versions": {"jax": "0.10.2", "python": "3.11.9"},
            "device": {"platform": "cpu", "kind": "cpu", "count": 8},
        },
        "sparsity": {
            "target": 0.3,
            "prunable": 0.2991,
            "total": 0.2123,
            "per_linear": got,
            "asked": {f"{layer}.{kind}": 0.3 for layer in layers for kind in MLP},
        },
        "parameters": {"dense": 1_234_567, "pruned": 987_654},
        "bytes": {"dense": 4_938_268, "pruned": 3_950_616},
        "perplexity": {"ptb": {"dense": 8.125, "pruned": 9.375, "tokens": 16_320}},
        "tasks": {},
        "seconds": {"load": 1.25, "calibrate_and_prune": 245.2, "eval": 33.1, "export": 0.5},
        "peak_memory_bytes": {"host": 3 * 2**30, "device": None},
        "scores": {
            "label": "PageRank of neurons",
            "per_linear": {
                f"{layer}.mlp.up_proj": [1e-5, 1e-4, 3e-4, 9e-4, 0.2] for layer in layers
            },
        },
        "warnings": ["damping was raised to 0.1"],
        "load_back": {"topiary": "largest difference of the logits 0"},
        "details": {
            "removed": {"model.layers.0.mlp.up_proj": list(range(1000, 1300))},
            "losses": [[3.125, None]],
        },
    }


def without_plots() -> dict[str, Any]:
    """A report that is quick to render."""
    report = make_report(1) | {"perplexity": {}, "scores": {}}
    report["sparsity"]["per_linear"] = report["sparsity"]["asked"] = {}
    return report


class Page(HTMLParser):
    """Checks that tags nest and ids are unique; gathers text, attributes and the words said to screen readers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        ids = [value for name, value in self.attributes if name == "id"]
        assert len(ids) == len(set(ids)), "the same id twice"
        self.text = "\n".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())


def test_every_figure_asked_for_is_there() -> None:
    report = make_report()
    page = Page(render(report))
    for part in (
        *("embedded:tiny-llama", 'llmrank(scorer="wpr")', "29.91%", "asked 30%", "21.23%"),
        *(
            "8.125",
            "9.375",
            "1.154x",
            "16,320",
            "1,234,567",
            "987,654",
            "-20.00%",
            "4.7 MiB",
            "3.8 MiB",
        ),
        *("1.25 s", "4 min 05 s", "33.1 s", "0.50 s", "3.0 GiB", "damping was raised to 0.1"),
        *("c0ffee", "beef", "33", "129", "17", "61", "257", "0.10.2", "3.11.9", "8"),
        *(
            report["command"],
            "largest difference of the logits 0",
            "PageRank of neurons",
            "model.layers.2.self_attn.q_proj",
            "3.125",
            "null",
        ),
    ):
        assert part in page.text, part
    assert page.tags.count("svg") == 3
    assert page.words.index("Warnings") < page.words.index("Dense and pruned")


def test_the_file_is_utf8_with_a_viewport_and_both_colour_schemes(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(make_report(), path)
    html = path.read_bytes().decode("utf-8")
    assert html.startswith("<!doctype html>") and '<meta charset="utf-8">' in html
    assert (
        'name="viewport" content="width=device-width' in html
        and "prefers-color-scheme: dark" in html
    )


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render(make_report())
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|//[a-z]", html)
    references = [
        value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")
    ]
    ids = {value for name, value in page.attributes if name == "id"}
    references += ["#" + name for name in re.findall(r"url\(#([^)]+)\)", html)]
    assert references and all(value.startswith("#") and value[1:] in ids for value in references)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_names_are_text_wherever_they_appear() -> None:
    bad = '<script>alert(1)</script>"><img src=x onerror=alert(1)></svg> a & b $x_1$ {{ 7 * 7 }}'
    report = make_report(1)
    report |= {
        "model": bad,
        "method": bad,
        "command": bad,
        "warnings": [bad],
        "load_back": {bad: bad},
        "details": {bad: [bad]},
    }
    report["settings"] = report["protocol"] = {bad: {bad: bad}}
    report["perplexity"] = {bad: {"dense": 1.5, "pruned": 2.5, "tokens": 3}}
    report["sparsity"]["per_linear"] = {f"layers.0.{bad}": 0.5, bad: 0.5}
    report["scores"] = {"label": bad, "per_linear": {f"layers.0.{bad}": [1, 2, 3, 4, 5]}}
    html = render(report)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.words.count(bad) >= 8


def test_one_report_gives_one_file_whatever_the_users_plot_style(tmp_path: Path) -> None:
    report = make_report()
    write_html(report, tmp_path / "a.html")
    with matplotlib.rc_context({"axes.linewidth": 9, "font.size": 30, "svg.fonttype": "path"}):
        write_html(json.loads(json.dumps(report)), tmp_path / "b.html")
    first = (tmp_path / "a.html").read_bytes()
    assert first == (tmp_path / "b.html").read_bytes()
    report["perplexity"]["ptb"]["pruned"] += 1
    write_html(report, tmp_path / "c.html")
    assert first != (tmp_path / "c.html").read_bytes()


def test_rendering_leaves_the_report_alone() -> None:
    report = make_report(1)
    before = copy.deepcopy(report)
    render(report)
    assert report == before


@pytest.mark.parametrize("value", [math.inf, math.nan, None, 7.3e7, 1e300, 0.0])
def test_a_collapsed_model_still_has_a_report(value: float | None) -> None:
    report = without_plots() | {"perplexity": {"ptb": {"dense": 8.0, "pruned": value, "tokens": 5}}}
    page = Page(render(report))
    text = {math.inf: "inf", None: "—", 7.3e7: "7.30e+07", 1e300: "1.00e+300", 0.0: "0.000"}.get(
        value, "nan"
    )
    assert text in page.words


@pytest.mark.parametrize(
    "missing",
    [
        "scores",
        "tasks",
        "details",
        "load_back",
        "warnings",
        "protocol",
        "perplexity",
        "settings",
        "bytes",
    ],
)
def test_a_part_that_is_empty_or_missing_is_left_out(missing: str) -> None:
    report = without_plots()
    report[missing] = type(report[missing])()
    empty = render(report)
    del report[missing]
    assert render(report) == empty
    Page(empty)


def test_the_least_report() -> None:
    page = Page(
        render({"model": "m", "method": "magnitude", "sparsity": {"target": None, "prunable": 0.0}})
    )
    assert "svg" not in page.tags and "Warnings" not in page.text and "Protocol" not in page.text


def test_odd_scores_and_sparsities_are_drawn_or_left_out() -> None:
    report = make_report(4)
    odd = [[math.nan] * 5, [0.0, 0.0, 1e-9, 1e-3, 10.0], [-1.0, 0.0, 1.0, 2.0, 3.0], [None] * 5]
    report["scores"]["per_linear"] = {f"model.layers.{i}.mlp.up_proj": q for i, q in enumerate(odd)}
    report["sparsity"]["per_linear"]["model.layers.0.mlp.up_proj"] = math.nan
    report["sparsity"]["asked"]["model.layers.1.mlp.up_proj"] = None
    Page(render(report))


@pytest.mark.parametrize("blocks", [1, 80])
def test_one_block_and_eighty(blocks: int) -> None:
    html = render(make_report(blocks))
    page = Page(html)
    assert page.text.count(".self_attn.q_proj") == blocks
    assert ("<details open>" in html) == (blocks == 1)
    assert len(html) < 400_000


def test_a_linear_without_a_budget_has_a_dash() -> None:
    words = Page(render(make_report(1))).words
    at = words.index("model.layers.0.self_attn.q_proj")
    assert words[at + 1 : at + 3] == ["—", "0%"]
    at = words.index("model.layers.0.mlp.up_proj", at)
    assert words[at + 1 : at + 3] == ["30%", "29.97%"]


def test_long_lists_of_the_details_are_cut_and_say_so() -> None:
    text = Page(render(without_plots())).text
    assert "1047, … 300 in all]" in text and "1048" not in text
    assert "[3.125, null]" in text


def test_tasks_are_listed() -> None:
    """In the table, in a plot with error bars, and by their protocol; what is no accuracy is in the table alone."""
    figures = {
        "acc": 0.6125,
        "acc_stderr": 0.0321,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": None,
        "perplexity": 12.5,
    }
    pruned = figures | {"acc": 0.5875, "acc_stderr": 0.0325, "perplexity": math.inf}
    report = without_plots() | {"tasks": {"arc_easy": {"dense": figures, "pruned": pruned}}}
    report["protocol"]["tasks"] = {
        "arc_easy": {"harness": "lm-eval 0.4.13", "version": 1.0, "documents": 1234}
    }
    page = Page(render(report))
    at = page.words.index("arc_easy, acc")
    assert page.words[at + 1 : at + 4] == ["61.25% ± 3.21%", "58.75% ± 3.25%", "-2.50 points"]
    at = page.words.index("arc_easy, exact_match,strict")
    assert page.words[at + 1 : at + 4] == ["25.00%", "25.00%", "+0.00 points"]
    at = page.words.index("arc_easy, perplexity")
    assert page.words[at + 1 : at + 4] == ["12.500", "inf", "—"]
    assert (
        "Accuracy, before and after" in page.words
        and "arc_easy: 1,234" in page.text
        and "lm-eval 0.4.13" in page.text
    )
    assert page.tags.count("svg") == 1


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": [1, "x"]}, "d": None, "e": "t", "f": {}}) == [
        ("a.b", "1"),
        ("a.c", '[1, "x"]'),
        ("d", "—"),
        ("e", "t"),
    ]


def test_what_to_expect_follows_the_bytes() -> None:
    report = make_report(1)
    assert "really taken out" in expectation(report)
    report["bytes"]["pruned"] = report["bytes"]["dense"]
    assert "zeros that stay in place" in expectation(report) and "pattern" not in expectation(
        report
    )
    report["settings"]["pattern"] = "2:4"
    assert "pattern 2:4" in expectation(report)
    report["sparsity"]["total"] = 0.0
    assert "Nothing was removed" in expectation(report)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.decoder.layers.11.fc1", (11, "fc1")),
        ("layers.0.kernel", (0, "kernel")),
        ("lm_head", None),
        ("model.sublayers.3.fc1", None),
    ],
)
def test_split(name: str, place: tuple[int, str] | None) -> None:
    assert plots.split(name) == place


def test_equal_profiles_share_a_panel_and_others_do_not() -> None:
    got = {
        f"model.decoder.layers.{i}.{kind}": 0.5
        for i in range(2)
        for kind in ("self_attn.q_proj", "fc1", "fc2")
    }
    assert _said(plots.sparsity_by_block(got, {}))[-2:] == ["q_proj, fc1, fc2", "50%"]
    got["model.decoder.layers.1.fc2"] = 0.75
    words = _said(plots.sparsity_by_block(got, {}))
    assert "q_proj, fc1" in words and "fc2" in words and "50% to 75%" in words
    words = _said(plots.sparsity_by_block(got, {"model.decoder.layers.0.fc1": 0.5}))
    assert "q_proj" in words and "fc1" in words, "a kind with a budget is not like one without"


def test_bars_are_as_long_as_their_figures() -> None:
    dense, pruned = _widths(plots.perplexity_bars({"a": {"dense": 5.0, "pruned": 10.0}}))
    assert pruned / dense == pytest.approx(2.0, rel=1e-3)
    dense, pruned = _widths(plots.perplexity_bars({"a": {"dense": 10.0, "pruned": 1000.0}}))
    assert pruned / dense == pytest.approx(3.0, rel=1e-3), (
        "on the log axis a bar's length is the cross-entropy"
    )


def test_scores_choose_a_log_axis_by_their_range() -> None:
    narrow = plots.scores_by_block({"layers.0.fc1": [1.0, 2.0, 3.0, 4.0, 5.0]}, "s")
    wide = plots.scores_by_block({"layers.0.fc1": [0.0, 1e-4, 1e-3, 1e-2, 1.0]}, "s")
    assert not {"1e-4", "0.001", "0.01"} & set(_said(narrow)) and {"0.001", "0.01"} <= set(
        _said(wide)
    )


def test_nothing_to_draw_is_no_plot() -> None:
    assert (
        plots.perplexity_bars({})
        == plots.sparsity_by_block({"lm_head": 0.5}, {})
        == plots.scores_by_block({}, "s")
        == ""
    )


def test_names_in_plots_are_neither_mathematics_nor_limited_to_one_script() -> None:
    svg = plots.perplexity_bars(
        {"a $x_1$ <b>": {"dense": 1.5, "pruned": 2.0}, "語料": {"dense": 1.5, "pruned": 2.0}}
    )
    assert {"a $x_1$ <b>", "語料"} <= set(_said(svg))


def test_plots_take_the_pages_colours() -> None:
    svg = plots.sparsity_by_block({"layers.0.attn.q": 0.5, "layers.0.fc1": 0.25}, {})
    assert "currentColor" in svg and plots.BLUE in svg and plots.ORANGE in svg
    assert not re.search(r"#000000|#ffffff|font-family|<\?xml|<style", svg)


def _said(svg: str) -> list[str]:
    return Page(svg).words


def _widths(svg: str) -> list[float]:
    """Widths of the dense and the pruned bar, read back from the drawing's paths by their colours."""
    widths = []
    for colour in (plots.GREY, plots.BLUE):
        (path,) = re.findall(rf'd="([^"]*)"[^>]*fill: {colour}', svg)
        across = [float(pair.split()[0]) for pair in re.findall(r"-?[\d.]+ -?[\d.]+", path)]
        widths.append(max(across) - min(across))
    return widths


def allocated(**details: Any) -> dict[str, Any]:
    report = make_report()
    report["details"] = {"block_sparsity": [0.2, 0.31, 0.39], **details}
    return report


def test_an_allocation_is_a_table_and_a_plot() -> None:
    html = render(allocated(outliers=[0.0123, 0.0071, 0.0042]))
    for part in (
        "<h2>Allocation</h2>",
        "31%",
        "1.23% outliers",
        "Sparsity allotted to each block",
        "3 blocks",
    ):
        assert part in html, part
    assert "exponent 2.500" in render(allocated(alpha=[{"q": 2.0, "k": 3.0}] * 3))
    assert "Allocation</h2>" not in render(make_report())


def test_a_search_shows_its_scores() -> None:
    tried = {"block_lambdas": [0.0, 0.1, 0.2], "block_scores": [5.5, 5.1, 5.3], "block_lambda": 0.1}
    html = render(allocated(**tried, row_lambdas=[], row_scores=[], row_lambda=None))
    assert "Scores of lambda, block step" in html and "Scores of lambda, row step" not in html
    assert plots.ORANGE in plots.scores_of_lambdas([0.0, 0.1], [5.0, 4.0], 0.1, "row step")
    assert plots.ORANGE not in plots.scores_of_lambdas([0.0, 0.1], [5.0, math.nan], 0.1, "row step")
    assert (
        plots.scores_of_lambdas([], [], None, "row step")
        == plots.allocation_by_block([], 0.5)
        == ""
    )


def test_a_search_for_blocks_is_a_plot() -> None:
    losses = [[None, 3.0, 2.0, 90.0], [None, 3.5, None, None]]
    html = render(make_report() | {"details": {"removal_order": [2, 1], "losses": losses}})
    assert "Loss without each block" in html and "in this order: 2, 1." in html
    parts = {"removal_order": [2], "losses": losses[:1], "removed_parts": [[1, "o"]]}
    assert (
        "Loss without each sublayer" in (html := render(make_report() | {"details": parts}))
        and "1 (o)" in html
    )
    assert "Loss without" not in render(
        make_report() | {"details": {"removal_order": [2], "losses": []}}
    )
    assert (
        plots.losses_by_unit([[2.0, 2.0]], [0], "block")
        and plots.losses_by_unit([[None]], [], "block") == ""
    )
