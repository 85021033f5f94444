"""The HTML report is complete, escaped, self-contained, well-formed and reproducible."""

import copy
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from launch.report import documentation
from launch.report.html import expectation, flat, render, write_html
from pruning.figures import LineSeries, Table, kept_map, to_json
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from reference.html_page import Page

ROOT = Path(__file__).parents[3]
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
        "command": "python -m launch.prune --model=embedded:tiny-llama "
        "'--method=llmrank(scorer=\"wpr\")' --sparsity=0.3",
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


def test_the_page_holds_every_number_of_the_report() -> None:
    report = make_report()
    page = Page(render(report))
    for part in (
        *("embedded:tiny-llama", 'llmrank(scorer="wpr")', "29.91%", "target 30%", "21.23%"),
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
            "largest difference of the logits 0",
            "PageRank of neurons",
            "model.layers.2.self_attn.q_proj",
            "3.125",
            "null",
        ),
    ):
        assert part in page.text, part
    (command,) = [word for word in page.words if word.startswith("python -m")]
    assert shlex.split(command.replace("\\\n", "")) == shlex.split(report["command"])
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


def test_names_are_shown_as_text_wherever_they_appear() -> None:
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


def test_a_report_with_only_the_required_keys_is_a_page() -> None:
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
def test_long_tables_are_folded_and_the_page_stays_small(blocks: int) -> None:
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
    assert "1047, … 300 in total]" in text and "1048" not in text
    assert "[3.125, null]" in text


def test_tasks_are_in_the_table_the_plot_and_the_protocol() -> None:
    """Accuracies have a plot with error bars; other metrics are in the table alone."""
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
        "Accuracy before and after" in page.words
        and "arc_easy: 1,234" in page.text
        and "lm-eval 0.4.13" in page.text
    )
    assert page.tags.count("svg") == 1


def test_nested_settings_become_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": [1, "x"]}, "d": None, "e": "t", "f": {}, "g": ""}) == [
        ("a.b", "1"),
        ("a.c", '[1, "x"]'),
        ("d", "—"),
        ("e", "t"),
        ("g", "—"),
    ]


def test_the_expected_saving_follows_the_parameters() -> None:
    report = make_report(1)
    assert "no longer stored" in expectation(report)
    report["parameters"]["pruned"] = report["parameters"]["dense"]
    assert "stored as zeros" in expectation(report) and "pattern" not in expectation(report)
    report["settings"]["pattern"] = "2:4"
    assert "pattern 2:4" in expectation(report)
    report["sparsity"]["total"] = 0.0
    assert "Nothing was removed" in expectation(report)


LOADING = {
    "class": "LlamaForCausalLM",
    "model_type": "llama",
    "trust_remote_code": False,
    "tokenizer": True,
}


def test_the_page_says_how_to_load_the_model_and_as_what() -> None:
    stock = without_plots() | {"loading": LOADING}
    words = Page(render(stock)).words
    (code,) = [word for word in words if word.startswith("from transformers")]
    compile(code, "snippet", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("/out/pruned")' in code
    assert 'AutoTokenizer.from_pretrained("/out/pruned")' in code
    assert words[words.index("trust_remote_code") + 1] == "not needed"
    own = {"class": "PrunedForCausalLM", "trust_remote_code": True, "tokenizer": False}
    page = Page(render(stock | {"loading": LOADING | own}))
    (code,) = [word for word in page.words if word.startswith("from transformers")]
    assert 'from_pretrained("/out/pruned", trust_remote_code=True)' in code
    assert "Tokenizer" not in code and "PrunedForCausalLM" in page.words


def test_the_title_is_the_models_name_and_the_date_is_below() -> None:
    report = without_plots() | {"model": "/data/models/SmolLM2/", "date": "2026-11-28T21:30:00Z"}
    page = Page(render(report))
    assert page.words[0] == "SmolLM2, pruned with " + report["method"]
    assert "2026-11-28" in page.words and "/data/models/SmolLM2/" not in page.words


def test_notes_stand_apart_from_warnings() -> None:
    report = without_plots() | {"warnings": ["it broke"], "notes": ["by the way"]}
    html = render(report)
    orange = html[html.index('class="warnings"') : html.index("</section>")]
    assert "it broke" in orange and "by the way" not in orange and "by the way" in html
    assert "Warnings" not in Page(render(report | {"warnings": []})).words


def test_pages_of_the_documentation_are_those_of_the_parts_that_a_run_used() -> None:
    report = without_plots() | {"method": "magnitude_sp", "settings": {"allocation": "owl(m=7)"}}
    pages = documentation.pages(report | {"settings": {"allocation": "owl(m=7)", "refine": "none"}})
    assert pages == [
        ("magnitude_sp", "docs/methods/wanda-sp.md"),
        ("owl", "docs/methods/owl.md"),
    ]
    assert documentation.pages({"method": "of_my_own(a=1)"}) == []
    for name in (*METHODS, *ALLOCATIONS, *REFINEMENTS):
        pages = documentation.pages({"method": name})
        assert bool(pages) == (name not in ("uniform", "none")), name
        assert all((ROOT / page.path).is_file() for page in pages)


def test_a_map_without_removed_units_is_left_out() -> None:
    whole = kept_map("heads", [np.ones(4, bool)] * 2)
    cut = kept_map("neurons", [np.arange(4) > 0] * 2)
    report = without_plots() | {"figures": [to_json(whole), to_json(cut)]}
    words = Page(render(report)).words
    assert "Kept neurons" in words and "Kept heads" not in words


def test_speed_is_shown_where_it_was_measured() -> None:
    rates = {"dense": 1000.4, "pruned": 1250.0, "speedup": 1.256}
    speed = {"device": "cpu", "batches": {"8": {"prompt": rates, "generation": rates}}}
    words = Page(render(without_plots() | {"speed": speed})).words
    at = words.index("Generation, batch 8, cpu")
    assert words[at + 1 : at + 4] == ["1,000 tokens/s", "1,250 tokens/s", "1.26x as fast"]


def with_figures(*figures: LineSeries | Table) -> dict[str, Any]:
    """A report with figures of a method, as read from pruning_report.json."""
    return json.loads(json.dumps(make_report() | {"figures": [to_json(f) for f in figures]}))


def test_lines_of_a_method_are_a_plot_with_its_caption() -> None:
    line = LineSeries("Loss by step", "step", "loss", {"a": [3.0, None, 2.0]}, caption="Lower <b>.")
    page = Page(render(with_figures(line)))
    assert page.tags.count("svg") == 4
    assert "Loss by step" in page.words and "Lower <b>." in page.words


def test_a_table_of_a_method_is_a_section() -> None:
    rows = [["0", 0.2, "x"], ["1", 0.31, None], ["2", 0.39, 2.5]]
    table = Table("Allocation", ("block", "sparsity", "exponent"), rows, fractions=("sparsity",))
    words = Page(render(with_figures(table))).words
    assert words[words.index("Allocation") + 1] == "3 rows"
    start = words.index("block", words.index("Allocation"))
    assert words[start : start + 12] == [
        *("block", "sparsity", "exponent"),
        *("0", "20%", "x"),
        *("1", "31%", "—"),
        *("2", "39%", "2.5"),
    ]


def test_a_path_is_shown_by_its_file_name_and_kept_in_the_protocol() -> None:
    report = without_plots() | {
        "perplexity": {"/a/long/way/valid.npy": {"dense": 2.0, "pruned": 3}}
    }
    report["protocol"]["evaluation"] = {
        "/a/long/way/valid.npy": {"source": "/a/long/way/valid.npy"}
    }
    words = Page(render(report)).words
    assert "Perplexity, valid.npy" in words and "evaluation: valid.npy" in words
    assert [word for word in words if "/a/long" in word] == ["/a/long/way/valid.npy"]
