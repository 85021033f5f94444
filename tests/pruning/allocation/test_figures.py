"""An allocation is a plot and a table by block; a search is a plot of its scores."""

from launch.report.figure_plots import table_cells
from pruning.allocation.figures import allocation_figures, search_figure
from pruning.figures import LineSeries, Table

SPARSITY = [0.2, 0.31, 0.39]


def test_an_allocation_is_a_plot_and_a_table() -> None:
    line, table = allocation_figures(SPARSITY, 0.3, "outliers", [0.0123, 0.0071, 0.0042], True)
    assert isinstance(line, LineSeries) and isinstance(table, Table)
    assert line.level == 0.3 and line.series == {"sparsity": SPARSITY}
    assert table_cells(table)[:2] == [["0", "20%", "1.23%"], ["1", "31%", "0.71%"]]


def test_a_cause_that_is_no_fraction_is_a_number() -> None:
    _, table = allocation_figures(SPARSITY, 0.3, "exponent", [2.5, 3.0, 2.125])
    assert isinstance(table, Table)
    assert table_cells(table)[2] == ["2", "39%", "2.125"]


def test_an_allocation_without_a_cause_has_two_columns() -> None:
    _, table = allocation_figures(SPARSITY, 0.3)
    assert isinstance(table, Table) and table_cells(table)[0] == ["0", "20%"]


def test_the_chosen_lambda_is_marked() -> None:
    assert search_figure("block", [0.0, 0.1, 0.2], [5.5, 5.1, 5.3], 0.1).marked == {"score": [1]}
    assert search_figure("row", [0.0], [1.0], None).marked == {"score": []}
