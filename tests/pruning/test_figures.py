"""Figures survive JSON, and a map of kept units adds up."""

import json

import numpy as np
import pytest

from pruning import figures
from pruning.figures import KeptMap, LineSeries, Table

EXAMPLES = {
    "line_series": LineSeries("t", "x", "y", {"a": [1.0, None]}, [0.5, 1.5], marked={"a": [1]}),
    "kept_map": KeptMap("t", "heads", 2, [[1.0, 0.0]], "c"),
    "table": Table("t", ["a", "b"], [["x", 0.5]], ["b"]),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_figure_survives_json(kind: str) -> None:
    fields = json.loads(json.dumps(figures.to_json(EXAMPLES[kind])))
    assert fields["kind"] == kind
    assert figures.from_json(fields) == EXAMPLES[kind]


def test_a_cell_is_the_fraction_that_is_kept() -> None:
    figure = figures.kept_map("heads", [np.array([True, False, True]), np.zeros(3, bool)])
    assert figure.kept == [[1, 0, 1], [0, 0, 0]] and figure.units == 3
    assert "2 of 6 heads are left" in figure.caption


def test_blocks_of_different_widths_have_cells_of_their_own_units_alone() -> None:
    masks = [np.array([True, False]), np.array([False, True, True, True])]
    figure = figures.kept_map("heads", masks)
    assert figure.kept == [[1, 0, None, None], [0, 1, 1, 1]] and figure.units == 4
    assert "4 of 6 heads are left" in figure.caption and "differ in width" in figure.caption
    many = figures.kept_map("neurons", [np.ones(300, bool), np.ones(1000, bool)]).kept
    assert [cell is None for cell in many[0]].count(False) == pytest.approx(300 * 256 / 1000, abs=1)
    assert len(many[0]) == len(many[1]) == figures.MAX_CELLS


def test_cells_of_many_units_add_up_to_the_units_kept() -> None:
    figure = figures.kept_map("neurons", [np.arange(1000) % 2 == 0])
    many = np.array(figure.kept)
    assert many.shape == (1, figures.MAX_CELLS)
    assert many.min() >= 1 / 4 and many.max() <= 3 / 4
    sizes = np.diff([*np.linspace(0, 1000, figures.MAX_CELLS + 1).astype(int)])
    assert (many[0] * sizes).sum() == pytest.approx(500)
