"""SLEB's search is a plot of its losses and a map of the blocks kept."""

from pruning.figures import KeptMap, LineSeries
from pruning.structured.sleb_figures import search_figures

LOSSES = [[None, 3.0, 2.0, 90.0], [None, 3.5, None, None]]


def test_each_phase_is_a_line_with_its_removed_block_marked() -> None:
    lines, kept = search_figures(LOSSES, [2, 1], None)
    assert isinstance(lines, LineSeries) and isinstance(kept, KeptMap)
    assert lines.title == "Loss without each block" and "in this order: 2, 1." in lines.caption
    assert list(lines.series.values()) == LOSSES
    assert list(lines.marked.values()) == [[2], [1]]


def test_all_blocks_removed_after_a_single_phase_are_marked_in_it() -> None:
    lines, _ = search_figures(LOSSES[:1], [2, 1], None)
    assert isinstance(lines, LineSeries) and list(lines.marked.values()) == [[2, 1]]


def test_the_map_shows_the_blocks_kept() -> None:
    _, kept = search_figures([[1.0, None, 2.0, 3.0]], [2, 0], None)
    assert isinstance(kept, KeptMap) and kept.kept == [[0.0, 1.0, 0.0, 1.0]]
    assert "2 of 4 blocks are left" in kept.caption


def test_halves_of_blocks_have_a_plot_without_a_map() -> None:
    (lines,) = search_figures(LOSSES[:1], [2], [(1, "o")])
    assert isinstance(lines, LineSeries)
    assert lines.title == "Loss without each sublayer" and "1 (o)" in lines.caption


def test_a_search_without_losses_has_no_figures() -> None:
    assert search_figures([], [2], None) == search_figures(LOSSES, [], None) == ()
