"""Plot perplexity against size and speed, and the runs that no other run beats."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.report import summary
from launch.report.quality_plots import LOG_RANGE
from launch.report.svg import GREY, INK, ORANGE, PALE_INK, TEAL, WIDTH, save, style, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

LEGEND = "green: no other run is better on both axes; orange: another run is"
# Offsets of a name from its point in points, the preferred ones first.
PLACES = [(side, height) for height in (4, -10, 14, -20, 24, -30) for side in (5, -5)]
PARAMETERS = "parameters left"  # the one x axis on which less is better


class Point(NamedTuple):
    """A run on the plot.

    Attributes:
      name: Name of the run.
      x: Fraction of parameters left, or speed relative to the dense model.
      perplexity: Perplexity of the pruned model.
    """

    name: str
    x: float
    perplexity: float


def pareto_front(points: Sequence[Point], less: bool) -> list[Point]:
    """Return the points that no other point beats on both axes, in order of x.

    Args:
      points: The runs.
      less: True if a lower x is better, False if a higher one is.
    """
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x if less else -p.x, p.perplexity)):
        if not front or p.perplexity < front[-1].perplexity:
            front.append(p)
    return sorted(front, key=lambda p: p.x)


def _draw(ax: "Axes", data: str, x_label: str, points: Sequence[Point]) -> None:
    """Draw the runs of one data set, and a line through those that no other run beats."""
    finite = [p for p in points if math.isfinite(p.perplexity)]
    best = pareto_front(finite, x_label == PARAMETERS)
    xs, ys = [p.x for p in best], [p.perplexity for p in best]
    ax.step(xs, ys, where="post", color=GREY, linewidth=1.0)
    for p in finite:
        ax.plot(p.x, p.perplexity, "o", color=TEAL if p in best else ORANGE, markersize=5)
    values = [p.perplexity for p in finite]
    if values and max(values) > LOG_RANGE * min(values):
        ax.set_yscale("log")
        ax.minorticks_off()
    if x_label == PARAMETERS:
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
    ax.yaxis.set_major_formatter(lambda value, _: tick(value))
    ax.grid(axis="both")
    ax.margins(x=0.2, y=0.15)
    ax.set_title(f"perplexity, {summary.shorten(data)}")
    ax.set_xlabel(x_label)


def label_points(ax: "Axes", points: Sequence[Point]) -> None:
    """Write each run's name beside its point, at the first place that no other name covers.

    Args:
      ax: Axes that are already laid out.
      points: The runs.
    """
    taken: list[Bbox] = []
    for p in sorted(points, key=lambda p: p.x):
        for dx, dy in PLACES:
            text = ax.annotate(
                summary.shorten(p.name),
                (p.x, p.perplexity),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=8,
            )
            box = text.get_window_extent()
            if (dx, dy) == PLACES[-1] or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def save_comparison(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], path: Path, dark: bool = False
) -> None:
    """Draw the runs to .svg or .png, a row per data set and a column per x axis.

    A line joins the runs that no other run beats; the others have another colour. Runs without a
    finite perplexity are left out.

    Args:
      panels: {data set: {label of the x axis: points}}.
      path: File to write.
      dark: Draw for a dark page, on no background.
    """
    from matplotlib.figure import Figure

    labels = summary.short_names(panels)
    with style("compare", PALE_INK if dark else INK):
        columns = max(map(len, panels.values()))
        figure = Figure(figsize=(WIDTH * columns, 3.4 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), columns, squeeze=False)
        for axes, (data, by_label) in zip(grid, panels.items(), strict=True):
            for ax, (x_label, points) in zip(axes, by_label.items(), strict=True):
                _draw(ax, labels[data], x_label, points)
        figure.supxlabel(LEGEND, fontsize=8)
        figure.draw_without_rendering()  # lays the axes out, so that labels can be placed
        for axes, by_label in zip(grid, panels.values(), strict=True):
            for ax, points in zip(axes, by_label.values(), strict=True):
                label_points(ax, [p for p in points if math.isfinite(p.perplexity)])
        save(figure, path, transparent=dark)
