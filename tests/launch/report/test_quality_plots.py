"""Bars of perplexity are as long as their numbers and name any data set."""

import re

import pytest

from launch.report import svg
from launch.report.quality_plots import perplexity_bars
from reference.html_page import Page


def widths(text: str) -> list[float]:
    """Widths of the dense and the pruned bar, read from the drawing's paths by their colours."""
    result = []
    for colour in (svg.GREY, svg.BLUE):
        (path,) = re.findall(rf'd="([^"]*)"[^>]*fill: {colour}', text)
        across = [float(pair.split()[0]) for pair in re.findall(r"-?[\d.]+ -?[\d.]+", path)]
        result.append(max(across) - min(across))
    return result


def test_bars_are_as_long_as_their_numbers() -> None:
    dense, pruned = widths(perplexity_bars({"a": {"dense": 5.0, "pruned": 10.0}}))
    assert pruned / dense == pytest.approx(2.0, rel=1e-3)
    dense, pruned = widths(perplexity_bars({"a": {"dense": 10.0, "pruned": 1000.0}}))
    assert pruned / dense == pytest.approx(3.0, rel=1e-3), (
        "on the log axis a bar's length is the cross-entropy"
    )


def test_no_data_set_is_no_plot() -> None:
    assert perplexity_bars({}) == ""


def test_names_are_neither_mathematics_nor_limited_to_one_script() -> None:
    scores = {"dense": 1.5, "pruned": 2.0}
    text = perplexity_bars({"a $x_1$ <b>": scores, "語料": scores})
    assert {"a $x_1$ <b>", "語料"} <= set(Page(text).words)


def test_paths_are_shown_by_their_file_names() -> None:
    scores = {"dense": 1.5, "pruned": 2.0}
    texts = Page(perplexity_bars({"/data/a/valid.npy": scores, "c4": scores})).words
    assert {"valid.npy", "c4"} <= set(texts) and "/data" not in " ".join(texts)
