"""The table of `launch.mlprank` in the terminal."""

from collections.abc import Callable

import pytest
from rich.console import Console

from launch.mlp import report
from launch.mlp.report import DENSE, Row
from pruning.structured.page_rank_core import SCORERS


@pytest.fixture
def rows() -> Callable[[dict[str, list[float]]], list[Row]]:
    """Make rows from each scorer's test accuracies at one ratio, one a seed."""

    def make(values: dict[str, list[float]]) -> list[Row]:
        dense = [
            Row(DENSE, 0.0, seed, 1.0, 1.0, 10) for seed in range(len(next(iter(values.values()))))
        ]
        return dense + [
            Row(name, 0.3, seed, 0.5, v, 7)
            for name, tests in values.items()
            for seed, v in enumerate(tests)
        ]

    return make


def printed(rows: list[Row]) -> list[str]:
    """Return the table's lines in a terminal of 80 columns."""
    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(report.table("a title", rows))
    return capture.get().splitlines()


def test_the_table_marks_the_best_of_each_line(rows: Callable[..., list[Row]]) -> None:
    lines = printed(rows({"wpr": [0.9, 0.8], "norm": [0.7, 0.7], "mpr": [0.8, 0.9]}))
    line = next(line for line in lines if "30%" in line)
    assert line.split() == ["30%", "85.0±7.1*", "70.0±0.0", "85.0±7.1*"]
    assert next(line for line in lines if "average" in line).split()[1:] == line.split()[1:]
    assert "dense 100.0±0.0" in " ".join(lines)


def test_six_scorers_fit_eighty_columns(rows: Callable[..., list[Row]]) -> None:
    lines = printed(rows({name: [0.999, 0.5] for name in SCORERS}))
    assert max(map(len, lines)) <= 80
    # The ratio, the average, the caption: no cell is broken over two lines.
    assert len([line for line in lines if "±" in line]) == 3
