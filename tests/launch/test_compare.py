"""The comparison shows the reports' numbers and warns about those that cannot be compared."""

import itertools
import json
import math
import pathlib
import re
from typing import Any

import pytest
from matplotlib.figure import Figure

from launch import compare
from launch.flags.cli import run
from launch.report import compare_plot
from launch.report.compare_plot import Point


def report(method: str, total: float, perplexity: float, **more: Any) -> dict[str, Any]:
    dense = 1000
    return {
        "model": "m",
        "method": method,
        "settings": {"allocation": "uniform", "refine": "none"},
        "protocol": {"evaluation": {"a|b": {"sha256": "1"}}},
        "sparsity": {"total": total},
        "parameters": {"dense": dense, "pruned": int(dense * (1 - total))},
        "bytes": {"dense": 4 * dense, "pruned": int(4 * dense * (1 - total))},
        "perplexity": {"a|b": {"dense": 10.0, "pruned": perplexity, "tokens": 5}},
        "tasks": {},
        "seconds": {"calibrate_and_prune": 61.0},
    } | more


TASKS = {
    "piqa": {
        "dense": {"acc,none": 0.7, "acc_stderr,none": 0.01},
        "pruned": {"acc,none": 0.6, "acc_stderr,none": 0.02},
    }
}


def write(directory: pathlib.Path, content: dict[str, Any]) -> str:
    directory.mkdir()
    (directory / "pruning_report.json").write_text(json.dumps(content))
    return str(directory)


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> list[str]:
    return [
        write(tmp_path / "one", report("wanda_sp", 0.25, 20.0)),
        write(
            tmp_path / "two",
            report(
                "flap",
                0.5,
                15.0,
                tasks=TASKS,
                settings={"allocation": "owl(m=7)", "refine": "dsnot"},
            ),
        ),
        write(tmp_path / "three", report("sleb(blocks=2)", 0.1, math.inf)),
    ]


def test_the_table_holds_the_numbers_of_the_reports(
    runs: list[str], tmp_path: pathlib.Path
) -> None:
    speed = {
        "1": {
            d: {"speedup": {"prompt": 1 + k, "generation": 2 + k}}
            for k, d in enumerate(["m", *runs[:2]])
        }
    }
    (tmp_path / "speed.json").write_text(json.dumps({"figures": speed}))
    table = compare.rows(compare.read(runs, str(tmp_path / "speed.json")))
    assert table == [
        [
            "run",
            "removed",
            "parameters",
            "size",
            "perplexity, a|b",
            "piqa, acc,none",
            "prompts",
            "generation",
            "pruned in",
        ],
        ["dense", "", "1,000", "3.9 KiB", "10.000", "70.00% ± 1.00%", "1.00x", "1.00x", ""],
        ["wanda_sp", "25%", "750", "2.9 KiB", "20.000", "—", "2.00x", "3.00x", "1 min 01 s"],
        [
            "flap, owl(m=7), dsnot",
            "50%",
            "500",
            "2.0 KiB",
            "15.000",
            "60.00% ± 2.00%",
            "3.00x",
            "4.00x",
            "1 min 01 s",
        ],
        ["sleb(blocks=2)", "10%", "900", "3.5 KiB", "inf", "—", "—", "—", "1 min 01 s"],
    ]


def test_the_command_prints_and_writes(
    runs: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {flag: tmp_path / f"table.{flag}" for flag in ("markdown", "latex")}
    flags = [f"--{flag}={file}" for flag, file in files.items()]
    assert (
        run(
            compare.options(),
            compare.main,
            [
                *runs,
                *flags,
                f"--plot={tmp_path / 'plot.svg'}",
                f"--plot_dark={tmp_path / 'dark.svg'}",
            ],
        )
        == 0
    )
    seen = capsys.readouterr()
    assert "wanda_sp" in seen.out and "warning" not in seen.err
    lines = files["markdown"].read_text().splitlines()
    assert len(lines) == 6 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8}
    tabular = files["latex"].read_text().splitlines()
    assert tabular[0] == r"\begin{tabular}{lrrrrrr}" and r"wanda\_sp & 25\% & 750" in tabular[5]
    drawn = (tmp_path / "plot.svg").read_text()
    assert "flap, owl(m=7), dsnot" in drawn and "sleb" not in drawn, (
        "a run without a finite perplexity has no place"
    )
    dark = (tmp_path / "dark.svg").read_text()
    assert "#e6edf3" in dark and "#12171d" not in dark and "#e6edf3" not in drawn


def test_the_mean_of_several_tasks_needs_all_of_them(tmp_path: pathlib.Path) -> None:
    """Each task's first accuracy counts; the error is that of independent documents."""
    more = {
        "boolq": {
            "dense": {"acc,none": 0.5, "acc_stderr,none": 0.02},
            "pruned": {"acc,none": 0.4, "acc_stderr,none": 0.0},
        }
    }
    norm = {"acc_norm,none": 0.9, "acc_norm_stderr,none": 0.3}
    piqa = {"piqa": {which: figures | norm for which, figures in TASKS["piqa"].items()}}
    both = write(tmp_path / "both", report("flap", 0.5, 15.0, tasks=piqa | more))
    one = write(tmp_path / "one", report("wanda", 0.5, 15.0, tasks=TASKS))
    heads, dense, flap, wanda = compare.rows(compare.read([both, one], None))
    assert heads[5:-1] == [
        "piqa, acc,none",
        "piqa, acc_norm,none",
        "boolq, acc,none",
        "mean of the tasks",
    ]
    assert (dense[-2], flap[-2], wanda[-2]) == ("60.00% ± 1.12%", "50.00% ± 1.00%", "—")


def test_numbers_that_cannot_be_compared_are_named(runs: list[str], tmp_path: pathlib.Path) -> None:
    assert list(compare.differences(compare.read(runs, None))) == []
    other = report(
        "wanda",
        0.5,
        12.0,
        protocol={"evaluation": {"a|b": {"sha256": "2"}}},
        parameters={"dense": 9, "pruned": 9},
    )
    found = list(compare.differences(compare.read([*runs, write(tmp_path / "four", other)], None)))
    assert found == [
        "the dense models differ",
        "the tokens of a|b differ between the runs",
    ]


def test_the_front_has_the_runs_that_no_other_run_beats() -> None:
    a, b, c, d = Point("a", 0.5, 15), Point("b", 0.75, 20), Point("c", 0.9, 11), Point("d", 1.0, 10)
    assert compare_plot.pareto_front([d, b, c, a], less=True) == [a, c, d]
    assert compare_plot.pareto_front([a, b, c, d], less=False) == [d]
    assert compare_plot.pareto_front([Point("x", 2.0, 12), d, Point("y", 2.0, 14)], less=False) == [
        d,
        Point("x", 2.0, 12),
    ]


def test_names_of_close_points_do_not_cover_each_other() -> None:
    figure = Figure()
    ax = figure.subplots()
    points = [Point(f"run {k}", 0.5 + 0.001 * k, 10.0 + 0.01 * k) for k in range(5)]
    ax.plot([0.0, 1.0], [0.0, 20.0])
    figure.draw_without_rendering()
    compare_plot.label_points(ax, points)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert sorted(text.get_text() for text in ax.texts) == [p.name for p in points]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no directories were given"),
        (["nowhere"], "no readable pruning_report.json"),
        (["one", "--speed=one/pruning_report.json"], "is not output of launch.bench"),
        (["one", "--speed=speed.json"], "none of these directories"),
        (["one", "--plot=x.pdf"], "must end in .svg or .png"),
        (["one", "--latex=nowhere/x.tex"], "--latex=nowhere/x.tex cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str],
    says: str,
    runs: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speed.json").write_text(
        json.dumps({"figures": {"1": {"x": {"speedup": {"prompt": 1, "generation": 1}}}}})
    )
    assert run(compare.options(), compare.main, argv) == 2
    assert says in capsys.readouterr().err
