"""Every table shows the measures of agreement, and takes reports without them as they are."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import compare, sweep
from launch.flags.cli import run
from launch.report import console, html, measures, summary, sweep_table
from launch.report.compare_plot import WEIGHTS, Point, fronts, pareto_front
from launch.report.measures import GREEDY, KL, PERPLEXITY, TOP1
from launch.run import tracking

FIGURES = {
    "kl": 0.51234,
    "kl_stderr": 0.01,
    "top1": 0.7125,
    "top1_stderr": 0.005,
    "greedy": 2.5,
    "greedy_stderr": 0.75,
    "greedy_most": 32,
    "greedy_prompts": 16,
}


def report(**more: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "method": "wanda",
        "settings": {"allocation": "uniform", "refine": "none", "pattern": "unstructured"},
        "sparsity": {"target": 0.5, "total": 0.4, "prunable": 0.5},
        "parameters": {"dense": 1000, "pruned": 1000},
        "bytes": {"dense": 4000, "pruned": 4000},
        "perplexity": {"data/c4": {"dense": 10.0, "pruned": 15.0, "tokens": 5}},
        "agreement": {"data/c4": FIGURES},
        "tasks": {},
        "seconds": {"calibrate_and_prune": 61.0},
    } | more


OLD = {key: part for key, part in report().items() if key != "agreement"}
SHOWN = ["0.5123 ± 0.0100", "71.25% ± 0.50%", "2.5 ± 0.8"]


def test_a_runs_table_has_them_below_perplexity() -> None:
    rows = summary.quality_rows(report())
    assert [row.label for row in rows[:4]] == [
        "Perplexity, c4",
        "… KL from the dense model",
        "… same top token",
        "… same greedy tokens",
    ]
    assert [row.pruned for row in rows[1:4]] == SHOWN
    assert rows[1].change == "nats per token" and rows[3].change == "of 32 tokens"
    terminal = io.StringIO()
    console.show(report(), Console(file=terminal, width=100))
    page = html.render(report())
    for text in SHOWN:
        assert text in terminal.getvalue() and text in page
    assert "KL 0.5123; same top token 71.25%" in page  # beside the headline


def test_their_spread_over_draws_stands_below_them() -> None:
    spread = {"mean": 0.5, "std": 0.02, "min": 0.48, "max": 0.52}
    more = report(spread={"agreement": {"data/c4": {"kl": spread}}}, draws=[{}, {}])
    label, value, span = list(measures.rows(more, "data/c4"))[1]
    assert "calibration draws" in label
    assert (value, span) == ("0.5000 ± 0.0200", "0.4800 to 0.5200")


def test_values_that_are_unknown_or_not_finite_are_written() -> None:
    broken = FIGURES | {"kl": math.nan, "kl_stderr": None}
    rows = list(measures.rows(report(agreement={"data/c4": broken}), "data/c4"))
    assert rows[0][1] == "nan"
    two = {key: value for key, value in FIGURES.items() if not key.startswith("greedy")}
    assert len(list(measures.rows(report(agreement={"data/c4": two}), "data/c4"))) == 2


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    directories = []
    for name, content in (("new", report()), ("old", OLD | {"method": "flap"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pruning_report.json").write_text(json.dumps(content))
        directories.append(str(tmp_path / name))
    return directories


def test_the_comparison_has_columns_of_them_and_takes_older_reports(runs: list[str]) -> None:
    def table_of(directories: list[str]) -> list[list[str]]:
        read = compare.read(directories, None)
        return compare.rows(read, compare.marks_of(read))

    heads, dense, new, old = table_of(runs)
    first = heads.index("perplexity, c4")
    assert heads[first + 1 : first + 4] == [
        "KL, c4",
        "same top token, c4",
        "same greedy tokens, c4",
    ]
    assert dense[first : first + 4] == ["10.000", "0.0000", "100.00%", "32.0"]
    assert new[first : first + 4] == ["15.000", "0.5123", "71.25%", "2.5"]
    assert old[first : first + 4] == ["15.000", "—", "—", "—"]
    assert "KL, c4" not in table_of(runs[1:])[0]


def test_a_plot_has_the_measure_that_is_asked_for(runs: list[str], tmp_path: Path) -> None:
    plot = tmp_path / "p.svg"
    read = compare.read(runs, None)
    points = compare.points(read, compare.marks_of(read), "data/c4", TOP1)[WEIGHTS]
    assert [(p.name, p.y) for p in points] == [("dense", 1.0), ("wanda 50%", 0.7125)]
    argv = [*runs, f"--plot={plot}", "--measure=top1"]
    assert run(compare.options(), compare.main, argv) == 0
    text = plot.read_text()
    assert "same top token (share of positions), c4" in text and "flap" not in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--measure=kl"], "--measure=kl does nothing without --plot"),
        (["--measure=kl", "--plot=p.svg"], "--measure=kl is in none of the reports"),
    ],
)
def test_a_measure_that_nothing_shows_is_refused(
    argv: list[str], said: str, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compare.options(), compare.main, [runs[1], *argv]) == 2
    assert said in capsys.readouterr().err


def test_where_more_is_better_the_front_has_the_highest() -> None:
    a, b, c = Point("a", 0.5, 0.6), Point("b", 0.6, 0.5), Point("c", 0.7, 0.9)
    assert pareto_front([a, b, c], less=True, less_y=False) == [a, c]
    (front,) = fronts([a, b, c], WEIGHTS, less_y=False).values()
    assert front == [a, c]


def test_a_sweeps_table_has_columns_of_them() -> None:
    """One of two seeds was run before reports had them."""
    flags = ["--model=m", "--methods=wanda", "--sparsities=0.5", "--seeds=0,1"]
    trials = sweep.grid(sweep.options().parse(flags), Path("out"))
    rows = [
        sweep_table.finished_row(trial, r) for trial, r in zip(trials, (OLD, report()), strict=True)
    ]
    assert rows[1]["kl:data/c4"] == 0.51234 and "kl:data/c4" not in rows[0]
    heads, line, dense = sweep_table.table(rows)
    assert heads[2:6] == [
        "perplexity, c4",
        "KL, c4",
        "same top token, c4",
        "same greedy tokens, c4",
    ]
    assert line[3].startswith("0.5123") and dense[2:6] == ["10.000", "0.0000", "100.00%", "32.0"]
    assert sweep_table.table(rows[:1])[0][3] == "reached"
    waiting = sweep_table.pending_row(trials[0], "waiting")
    assert sweep_table.table([waiting, rows[1]])


def test_trackers_get_them() -> None:
    values = tracking.of_run(report()).values
    assert values["agreement/c4/kl"] == FIGURES["kl"]
    assert values["agreement/c4/top1"] == FIGURES["top1"]
    assert not any(name.startswith("agreement") for name in tracking.of_run(OLD).values)


def test_the_dense_model_agrees_with_itself() -> None:
    assert [m.of_dense(report(), "data/c4") for m in (PERPLEXITY, KL, TOP1, GREEDY)] == [
        10.0,
        0.0,
        1.0,
        32,
    ]
    assert [m.of_dense(OLD, "data/c4") for m in (PERPLEXITY, KL, TOP1)] == [10.0, None, None]
