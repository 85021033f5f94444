"""The front counts near-equal sizes as equal, and no name on the plot covers another."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from launch.report import compare_plot
from launch.report.compare_plot import (
    DENSE,
    OTHER,
    SMALLER,
    WEIGHTS,
    ZEROS,
    Point,
    fronts,
    kind_of,
    pareto_front,
    speed_axis,
)


def test_the_front_has_the_runs_that_no_other_run_beats() -> None:
    a, b, c, d = Point("a", 0.5, 15), Point("b", 0.75, 20), Point("c", 0.9, 11), Point("d", 1.0, 10)
    assert pareto_front([d, b, c, a], less=True) == [a, c, d]
    assert pareto_front([a, b, c, d], less=False) == [d]
    x, y = Point("x", 2.0, 12), Point("y", 2.0, 14)
    assert pareto_front([x, d, y], less=False) == [d, x]


def test_a_few_stray_zeros_put_no_run_on_the_front() -> None:
    """Magnitude removes 39.47 % where Wanda removes 39.46 %, at eight times the perplexity."""
    wanda = Point("wanda", 1 - 0.3946, 64.1)
    magnitude = Point("magnitude", 1 - 0.3947, 506.9)
    assert pareto_front([wanda, magnitude], True, WEIGHTS.tolerance) == [wanda]
    assert pareto_front([wanda, magnitude], True) == [magnitude, wanda]
    more = Point("more", 0.55, 70.0)
    assert pareto_front([wanda, magnitude, more], True, WEIGHTS.tolerance) == [more, wanda]


@pytest.mark.parametrize("less", [True, False])
def test_a_front_falls_and_leaves_out_only_what_is_beaten(less: bool) -> None:
    rng = np.random.default_rng(0)
    points = [Point(str(k), x, p) for k, (x, p) in enumerate(rng.uniform(0.1, 1, (60, 2)))]
    front = pareto_front(points, less, 0.02)
    heights = [p.y for p in front]
    assert heights == sorted(heights, reverse=less)
    for p in points:
        better = [
            q for q in points if q.y < p.y and (q.x - p.x <= 0.02 if less else p.x - q.x <= 0.02)
        ]
        assert (p in front) == (not better)


def test_zeros_in_place_never_beat_a_smaller_model_in_size() -> None:
    dense, small = Point("dense", 1.0, 10, DENSE), Point("flap", 0.8, 15, SMALLER)
    zeros = Point("wanda", 0.6, 11, ZEROS)
    best = Point("other", 0.5, 9, OTHER)
    every = [dense, small, zeros, best]
    assert fronts(every, WEIGHTS) == {SMALLER: [small, dense], ZEROS: [zeros, dense]}
    fast = [p._replace(x=2 - p.x) for p in every]
    assert fronts(fast, speed_axis("prompts")) == {DENSE: [fast[0], fast[2]]}


def test_the_kind_is_what_most_of_the_removed_weights_became() -> None:
    assert kind_of(stored=0.8, total=0.2) == SMALLER
    assert kind_of(stored=0.8, total=0.25) == SMALLER
    assert kind_of(stored=1.0, total=0.4) == ZEROS
    assert kind_of(stored=0.99, total=0.4) == ZEROS
    assert kind_of(stored=1.0, total=0.0) == ZEROS


@pytest.mark.parametrize("count", [5, 24])
def test_no_name_covers_another_or_a_point(count: int) -> None:
    """Names of runs in two clusters, as those of weight methods and of structured ones are."""
    rng = np.random.default_rng(count)
    figure = Figure(figsize=(5, 3 + 0.12 * count))
    ax = figure.subplots()
    xs = np.where(np.arange(count) % 2, 0.6, 0.85) + rng.normal(0, 0.004, count)
    ys = 30 + rng.uniform(0, 4, count)
    points = [
        Point(f"method_{k}(damp=0.01) 50%", x, y)
        for k, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]
    ax.plot(xs, ys, "o")
    ax.margins(0.25)
    figure.draw_without_rendering()
    compare_plot.label_points(ax, points, [pareto_front(points, True)])
    names = [text for text in ax.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert sorted(t.get_text() for t in names) == sorted(f"method_{k} 50%" for k in range(count))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    at = ax.transData.transform(np.column_stack([xs, ys]))
    assert not any(box.contains(*xy) for box in boxes for xy in at)
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_a_plot_explains_the_kinds_that_it_has(tmp_path: Path) -> None:
    points = [Point("dense", 1.0, 10, DENSE), Point("wanda 50%", 0.6, 12, ZEROS)]
    compare_plot.save_comparison({"c4": {WEIGHTS: points}}, tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    assert "dense model" in svg and "zeros stored in place" in svg and "none of its kind" in svg
    assert "a smaller model" not in svg and "other evaluation data" not in svg
    assert compare_plot.front_svg("t", points[:1]) == ""
    assert "wanda 50%" in compare_plot.front_svg("t", points)


def test_a_data_set_without_measured_speeds_leaves_their_panels_empty(tmp_path: Path) -> None:
    points = [Point("dense", 1.0, 10, DENSE), Point("flap 20%", 0.8, 12, SMALLER)]
    both = {WEIGHTS: points, speed_axis("prompts"): points}
    panels = {"c4": both, "ptb": {WEIGHTS: points}}
    compare_plot.save_comparison(panels, tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    assert svg.count("perplexity, c4") == 2 and svg.count("perplexity, ptb") == 1
