"""A sweep's results are combined over seeds, in its table, its files and its plot."""

import csv
import io
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import sweep
from launch.report.sweep_plot import Point, perplexity_by_sparsity
from launch.report.sweep_report import Board
from launch.report.sweep_table import DENSE as DENSE_PREFIX
from launch.report.sweep_table import columns, curves, front_points, lines, with_prefix
from launch.trials.trial import Trial

DENSE = 2.5
SCORES = {
    ("wanda", 0.3): [3.0, 3.5, 4.75],
    ("wanda", 0.5): [7.0, 8.0, 9.5],
    ("flap", 0.3): [math.inf, 5.0, 6.0],
}


def grid(*more: str) -> list[Trial]:
    flags = ["--model=m", "--methods=wanda,flap", "--sparsities=0.3,0.5", "--seeds=0,1,2", *more]
    return sweep.grid(sweep.options().parse(flags), Path("out"))


def report(sparsity: float, perplexity: float) -> dict[str, Any]:
    return {
        "sparsity": {"target": sparsity, "prunable": sparsity - 0.01, "total": sparsity / 2},
        "parameters": {"dense": 2000, "pruned": 1000 if sparsity < 0.5 else 2000},
        "bytes": {"pruned": 4096},
        "seconds": {"load": 1.0, "eval": 2.0},
        "tasks": {
            "piqa": {
                "dense": {"acc,none": 0.75, "acc_stderr,none": 0.1},
                "pruned": {"acc,none": 0.5 + sparsity / 10},
            },
            "lambada": {"dense": {"perplexity,none": 4.0}, "pruned": {"perplexity,none": 5.0}},
        },
        "perplexity": {
            "c4": {"dense": DENSE, "pruned": perplexity},
            "b,d": {"dense": 9.0, "pruned": 10.0},
        },
    }


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """Wanda and FLAP at 30 % are finished, FLAP at 50 % failed or waits, one is left out."""
    trials = grid()
    left_out = grid("--allocations=owl")[0]
    made = Board(tmp_path, {"model": "<m>", "seeds": "0,1,2"}, trials, [(left_out, "it cannot be")])

    def found(trial: Trial) -> dict[str, Any] | None:
        c = trial.config
        scores = SCORES.get((c.method, float(c.sparsity or 0)))
        return scores and report(float(c.sparsity or 0), scores[c.seed])

    monkeypatch.setattr(Trial, "report", found)
    for trial in trials:
        made.update(trial)
    made.update(trials[3], "it broke, badly")
    assert trials[3].name == "flap-0.5-seed0"
    return made


def test_lines_are_means_and_deviations_over_seeds(board: Board) -> None:
    got = {(line.method, line.sparsity): line for line in lines(board.rows)}
    assert list(got) == [("wanda", 0.3), ("wanda", 0.5), ("flap", 0.3), ("flap", 0.5)]
    for key in [("wanda", 0.3), ("wanda", 0.5)]:
        assert got[key].perplexity["c4"] == pytest.approx(
            (statistics.mean(SCORES[key]), statistics.stdev(SCORES[key]))
        )
        assert got[key].reached == pytest.approx(key[1] - 0.01) and got[key].perplexity["b,d"] == (
            10.0,
            0.0,
        )
    assert got["flap", 0.3].perplexity["c4"].mean == math.inf
    assert got["flap", 0.3].accuracy == {
        "piqa, acc,none": (pytest.approx(0.53), pytest.approx(0.0, abs=1e-9))
    }
    empty = got["flap", 0.5]
    assert (empty.finished, empty.trials, empty.reached, empty.perplexity, empty.accuracy) == (
        0,
        3,
        None,
        {},
        {},
    )


def test_the_csv_file_holds_every_trial(board: Board, tmp_path: Path) -> None:
    board.publish()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    assert len(rows) == 13 and list(rows[0])[-1] == "error"
    by_name = {row["trial"]: row for row in rows}
    assert (
        float(by_name["wanda-0.5-seed2"]["perplexity:c4"]) == 9.5
        and by_name["wanda-0.5-seed2"]["seconds"] == "3.0"
    )
    assert float(by_name["wanda-0.5-seed2"]["accuracy:piqa, acc,none"]) == 0.55
    assert float(
        by_name["wanda-0.5-seed2"]["accuracy_dense:piqa, acc,none"]
    ) == 0.75 and "lambada" not in str(rows)
    assert (
        by_name["flap-0.5-seed0"]["error"] == "it broke, badly"
        and by_name["flap-0.5-seed1"]["state"] == "waiting"
    )
    assert (
        by_name["wanda-0.3-owl-seed0"]["state"] == "left out"
        and by_name["wanda-0.3-owl-seed0"]["perplexity:c4"] == ""
    )


def test_the_page_has_every_trial_and_the_reasons_for_failures(
    board: Board, tmp_path: Path
) -> None:
    board.publish()
    page = (tmp_path / "sweep.html").read_text()
    assert "&lt;m&gt;" in page and "<m>" not in page and "9 of 12 trials finished" in page
    assert page.count('href="trials/') == 9 and 'href="trials/wanda-0.3-seed1/report.html"' in page
    assert "it broke, badly" in page and "it cannot be" in page
    assert (
        page.count('<th scope="col">piqa, acc,none</th>') == 2
        and page.count("<td>53%</td>") == 6
        and "<td>75%</td>" in page
    )
    assert page.count("<svg") == 4 and "http" not in page.replace("http://www.w3.org", "")


def test_the_terminal_shows_the_table_and_the_failures(board: Board) -> None:
    console = Console(file=io.StringIO(), width=140)
    board.show(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "8.167 ± 1.258" in shown and "0 of 3" in shown and "dense" in shown and "2.500" in shown
    assert "failed: flap-0.5-seed0: it broke, badly" in shown and board.errors == {
        "flap-0.5-seed0": "it broke, badly"
    }
    assert (
        board.progress_line(grid()[0])
        == "10 of 12: wanda-0.3-seed0: perplexity 3.000 (c4), perplexity 10.000 (b,d)"
    )


def test_the_front_of_a_sweep_has_every_line_by_its_weights_left(board: Board) -> None:
    every, column = lines(board.rows), columns(board.rows)[0]
    dense, *points = front_points(every, column)
    assert dense == ("dense", 1.0, DENSE, "dense")
    assert [(p.name, round(p.x, 2), p.kind) for p in points] == [
        ("wanda 30%", 0.85, "smaller"),
        ("wanda 50%", 0.75, "zeros"),
        ("flap 30%", 0.85, "smaller"),
    ]
    assert points[0].y == pytest.approx(statistics.mean(SCORES["wanda", 0.3]))


def test_the_terminal_leaves_out_arguments_that_tell_nothing_apart(tmp_path: Path) -> None:
    methods = 'wanda,llmrank(scorer="wpr", gamma=0.5, theta=0.5, scope="local"),flap(metric="WIFN")'
    flags = ["--model=m", f"--methods={methods},flap(bias=False)", "--sparsities=0.3,0.5"]
    console = Console(file=io.StringIO(), width=80)
    trials = sweep.grid(sweep.options().parse(flags), tmp_path)
    Board(tmp_path, {"model": "/a/m"}, trials, []).show(console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines[:-1])) <= 80 and lines[0].strip() == "m"
    assert sum("llmrank  " in line for line in lines) == 2
    assert any('flap(metric="WIFN")' in line for line in lines)


def test_a_pattern_is_the_target_of_a_line() -> None:
    flags = ["--model=m", "--methods=wanda", "--pattern=2:4"]
    board = Board(Path("out"), {}, sweep.grid(sweep.options().parse(flags), Path("out")), [])
    assert [line.target for line in lines(board.rows)] == ["2:4"]


def test_curves_are_by_method_and_allocation_in_order_of_sparsity(board: Board) -> None:
    got = curves(lines(board.rows[::-1]), "c4")
    assert list(got) == ["flap", "wanda"] and [round(p.sparsity, 2) for p in got["wanda"]] == [
        0.29,
        0.49,
    ]
    assert got["wanda"][1].mean == pytest.approx(statistics.mean(SCORES["wanda", 0.5]))


def test_a_plot_names_its_curves_and_leaves_out_infinite_values() -> None:
    svg = perplexity_by_sparsity(
        {
            "wanda": [Point(0.3, 3.0, 0.1), Point(0.5, 900.0, math.nan)],
            "gone": [Point(0.3, math.inf, math.nan)],
        },
        2.5,
    )
    assert (
        svg.startswith("<svg") and ">wanda<" in svg and ">gone<" not in svg and "perplexity" in svg
    )
    assert svg == perplexity_by_sparsity(
        {"wanda": [Point(0.3, 3.0, 0.1), Point(0.5, 900.0, math.nan)]}, 2.5
    )
    assert perplexity_by_sparsity({"gone": [Point(0.3, math.inf, math.nan)]}, 2.5) == ""
    assert perplexity_by_sparsity({}, 2.5) == ""


def test_stray_zeros_do_not_stretch_the_axis_of_sparsity() -> None:
    """Marks a hundredth of a point apart would all read 50%."""
    svg = perplexity_by_sparsity(
        {"wanda": [Point(0.50001, 3.0, 0.1)], "flap": [Point(0.5, 4.0, 0.1)]}, 2.5
    )
    marks = re.findall(r">([\d.]+%)<", svg)
    assert len(marks) > 1 and len(set(marks)) == len(marks), marks


def test_a_board_without_any_figures_is_a_page_too(tmp_path: Path) -> None:
    empty = Board(tmp_path, {"model": "m"}, grid(), [])
    empty.publish()
    assert "0 of 12 trials finished" in (tmp_path / "sweep.html").read_text()
    empty.show(Console(file=io.StringIO()))
    assert with_prefix(empty.rows, DENSE_PREFIX) == {}
