"""A method's figures are drawn by their type: lines with marks, maps of kept units, tables."""

import base64
import io
import math
import re

import numpy as np

from launch.report import svg
from launch.report.figure_plots import kept_map, line_series, table_cells
from launch.report.html import render
from pruning import figures
from pruning.figures import LineSeries, Table
from reference.html_page import Page


def lambdas(scores: list[float], marked: list[int]) -> LineSeries:
    series, x = {"score": scores}, [0.1 * k for k in range(len(scores))]
    return LineSeries("Scores", "lambda", "score", series, x, marked={"score": marked})


def test_a_marked_value_is_drawn_in_orange() -> None:
    assert svg.ORANGE in line_series(lambdas([5.0, 4.0], [1]))
    assert svg.ORANGE not in line_series(lambdas([5.0, 4.0], []))


def test_a_marked_value_that_is_not_finite_is_left_out() -> None:
    assert svg.ORANGE not in line_series(lambdas([5.0, math.nan], [1]))


def test_lines_without_a_known_value_are_no_plot() -> None:
    assert line_series(lambdas([], [])) == ""
    assert line_series(LineSeries("Loss", "block", "loss", {"phase 1": [None, math.inf]})) == ""


def test_equal_values_are_a_plot() -> None:
    assert line_series(LineSeries("Loss", "block", "loss", {"1": [2.0, 2.0]}, cut_peaks=True))


def test_a_cut_axis_hides_no_ordinary_value() -> None:
    values = [3.0, 2.0, 2.5, 90.0]
    whole = LineSeries("Loss", "block", "loss", {"1": values})
    cut = whole._replace(cut_peaks=True)
    largest = [
        max(map(float, re.findall(r">(\d+(?:\.\d+)?)<", line_series(f)))) for f in (whole, cut)
    ]
    assert largest[0] >= 60 and 3.0 <= largest[1] < 60


def test_fractions_are_in_percent_with_their_range() -> None:
    line = LineSeries("s", "block", "sparsity", {"s": [0.2, 0.31, 0.39]}, level=0.3, fraction=True)
    assert "20% to 39%" in Page(line_series(line)).words


def test_several_lines_have_a_legend_unless_they_are_ordered() -> None:
    lines = LineSeries("s", "x", "y", {"first": [1.0, 2.0], "second": [2.0, 3.0]})
    assert {"first", "second"} <= set(Page(line_series(lines)).words)
    assert "first" not in Page(line_series(lines._replace(ordered=True))).words


def test_a_map_has_the_colour_of_the_unit_where_units_are_kept() -> None:
    from PIL import Image

    masks = [np.isin(np.arange(4), kept) for kept in ([0, 1, 2, 3], [1], [])]
    figure = figures.kept_map("heads", masks)
    assert "5 of 12 heads are left" in figure.caption
    png = re.search(r'href="data:image/png;base64,([^"]+)"', kept_map(figure))
    assert png
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode("".join(png[1].split())))))[..., 3]
    cells = np.asarray(Image.fromarray(alpha).resize((4, 3), Image.Resampling.NEAREST))
    assert {tuple(row) for row in (cells > 127).tolist()} == {
        (True,) * 4,
        (False, True, False, False),
        (False,) * 4,
    }


def test_units_that_a_block_never_had_are_paler_than_units_that_are_kept() -> None:
    from PIL import Image

    masks = [np.array([True, False]), np.array([True, True, False, True])]
    png = re.search(
        r'href="data:image/png;base64,([^"]+)"', kept_map(figures.kept_map("heads", masks))
    )
    assert png
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode("".join(png[1].split())))))[..., 3]
    cells = np.asarray(Image.fromarray(alpha).resize((4, 2), Image.Resampling.NEAREST))
    assert cells[0, 0] == 255 and cells[0, 1] == 0, "kept, removed"
    assert 0 < cells[0, 2] == cells[0, 3] < 64, "never there"


def test_a_map_is_on_the_page_with_its_caption() -> None:
    figure = figures.to_json(figures.kept_map("heads", [np.array([False, True])]))
    report = {"model": "m", "method": "sleb", "sparsity": {"per_linear": {}}, "figures": [figure]}
    page = render(report)
    assert "Kept heads" in page and "1 of 2 heads are left" in page


def test_cells_of_a_table_are_texts_percentages_and_short_numbers() -> None:
    table = Table("t", ("a", "b", "c"), [["x", 0.0123, 1.23456], [3, None, 2]], fractions=("b",))
    assert table_cells(table) == [["x", "1.23%", "1.235"], ["3", "—", "2"]]
