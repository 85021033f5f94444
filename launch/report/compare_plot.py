"""The plot of a comparison: what each run pays for its size and speed, and which runs no other one beats."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.report import plots, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPAN = 20  # a larger ratio of perplexities takes a log axis
PARAMETERS = "parameters left"  # the axis where less is better


class Point(NamedTuple):
    """A run: what it is called, what it costs or gains, its perplexity."""

    name: str
    x: float
    perplexity: float


def front(points: Sequence[Point], less: bool) -> list[Point]:
    """The points that no other one beats: none has a lower perplexity and a better x (lower if `less`, else higher); by x."""
    better = sorted(points, key=lambda p: (p.x if less else -p.x, p.perplexity))
    found: list[Point] = []
    for p in better:
        if not found or p.perplexity < found[-1].perplexity:
            found.append(p)
    return sorted(found, key=lambda p: p.x)


def _draw(ax: "Axes", data: str, label: str, points: Sequence[Point]) -> None:
    finite = [p for p in points if math.isfinite(p.perplexity)]
    best = front(finite, label == PARAMETERS)
    ax.step(
        [p.x for p in best],
        [p.perplexity for p in best],
        where="post",
        color=plots.GREY,
        linewidth=1.0,
    )
    for p in finite:
        ax.plot(
            p.x, p.perplexity, "o", color=plots.TEAL if p in best else plots.ORANGE, markersize=5
        )
        ax.annotate(
            summary.shorten(p.name),
            (p.x, p.perplexity),
            (5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    if finite and max(p.perplexity for p in finite) > SPAN * min(p.perplexity for p in finite):
        ax.set_yscale("log")
        ax.minorticks_off()
    if label == PARAMETERS:
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
    ax.yaxis.set_major_formatter(lambda value, _: plots.tick(value))
    ax.grid(axis="both")
    ax.margins(x=0.2, y=0.15)
    ax.set_title(f"perplexity, {summary.shorten(data)}")
    ax.set_xlabel(label)


def save(drawn: Mapping[str, Mapping[str, Sequence[Point]]], path: Path) -> None:
    """Draw {data set: {what the axis says: the runs' points}} to .svg or .png, a row a data set.

    The line joins the runs that no other one beats; those that one does beat have another colour. Runs without a finite perplexity
    are left out.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", plots.STYLE | {"svg.hashsalt": "compare"}]):
        columns = max(map(len, drawn.values()))
        figure = Figure(figsize=(plots.WIDTH * columns, 3.4 * len(drawn)), layout="constrained")
        grid = figure.subplots(len(drawn), columns, squeeze=False)
        for axes, (data, panels) in zip(grid, drawn.items(), strict=True):
            for ax, (label, points) in zip(axes, panels.items(), strict=True):
                _draw(ax, data, label, points)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
