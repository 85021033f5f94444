"""Plot quality against what is left and against speed, and the runs that no other run beats."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launch.report import run_names, summary
from launch.report.measures import PERPLEXITY, TOP1, Measure
from launch.report.removal import TOLERANCE
from launch.report.svg import (
    GREY,
    INK,
    ORANGE,
    PALE_INK,
    TEAL,
    WIDTH,
    perplexity_axis,
    render,
    save,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE, SMALLER, ZEROS, OTHER = "dense", "smaller", "zeros", "other data"
# How each kind of point is drawn, and its line in the legend.
STYLES: dict[str, dict[str, Any]] = {
    DENSE: {"marker": "D", "color": GREY, "label": "dense model"},
    SMALLER: {"marker": "o", "color": TEAL, "label": "weights taken out: a smaller model"},
    ZEROS: {
        "marker": "o",
        "color": ORANGE,
        "markerfacecolor": "none",
        "label": "zeros stored in place: as large as before",
    },
    OTHER: {"marker": "x", "color": GREY, "label": "other evaluation data: not comparable"},
}
FRONT = "line: none of its kind is better on both axes; pale: one is"
_PALE = 0.4
_NAME_WIDTH = 30  # characters of a line of a run's name
_STEP = 3.0  # pixels between two places for a name
_PAD = 3.0  # pixels around a name, since browsers have wider fonts
_LEADER = 10.0  # pixels between a name and its point from which a line joins them


class Point(NamedTuple):
    """A run on the plot.

    Attributes:
      name: Name of the run.
      x: Fraction of the weights left, or speed relative to the dense model.
      y: Quality of the pruned model: perplexity, or another measure.
      kind: Key of STYLES.
    """

    name: str
    x: float
    y: float
    kind: str = SMALLER


class Axis(NamedTuple):
    """The x axis of a panel.

    Attributes:
      label: Name of the axis.
      less: True if a lower x is better, False if a higher one is.
      tolerance: Differences of x up to this count as none.
      by_kind: True if smaller models and models with zeros have a front of their own, since zeros
        that stay stored save no space.
    """

    label: str
    less: bool
    tolerance: float
    by_kind: bool


# Two runs whose sparsities count as equal elsewhere do so here.
WEIGHTS = Axis("weights left and not zero, of the dense model's", True, TOLERANCE, True)


def speed_axis(part: str) -> Axis:
    """Return the axis of a measured speed, whose differences count from the second decimal on."""
    return Axis(f"{part}, times as fast as the dense model", False, 0.01, False)


def kind_of(stored: float, total: float) -> str:
    """Return SMALLER if most of what is gone is no longer stored, else ZEROS.

    Args:
      stored: Parameters stored, as a fraction of the dense model's.
      total: Weights that are gone or zero, as the same fraction.
    """
    return SMALLER if 1 - stored > total / 2 else ZEROS


def pareto_front(
    points: Sequence[Point], less: bool, tolerance: float = 0.0, less_y: bool = True
) -> list[Point]:
    """Return the points that no other point beats on both axes, in order of x.

    Args:
      points: The runs.
      less: True if a lower x is better, False if a higher one is.
      tolerance: Differences of x up to this count as none.
      less_y: True if a lower y is better, False if a higher one is.
    """

    def beats(a: Point, b: Point) -> bool:
        gain = b.x - a.x if less else a.x - b.x
        if a.y == b.y:
            return gain > tolerance
        return (a.y < b.y) == less_y and gain >= -tolerance

    front = [p for p in points if not any(beats(other, p) for other in points)]
    return sorted(front, key=lambda p: (p.x, p.y))


def fronts(points: Sequence[Point], axis: Axis, less_y: bool = True) -> dict[str, list[Point]]:
    """Return each front by the kind whose style it takes; a front has the dense model, too.

    Args:
      points: The runs of a panel.
      axis: Its x axis.
      less_y: True if a lower y is better, False if a higher one is.
    """
    comparable = [p for p in points if p.kind != OTHER]
    if not axis.by_kind:
        return {DENSE: pareto_front(comparable, axis.less, axis.tolerance, less_y)}
    result = {}
    for kind in (SMALLER, ZEROS):
        members = [p for p in comparable if p.kind in (kind, DENSE)]
        if any(p.kind == kind for p in members):
            result[kind] = pareto_front(members, axis.less, axis.tolerance, less_y)
    return result


def _draw(
    ax: "Axes", title: str, axis: Axis, points: Sequence[Point], measure: Measure = PERPLEXITY
) -> None:
    """Draw the runs of one data set, and a line through those that no other run beats."""
    every = fronts(points, axis, measure.less)
    for kind, front in every.items():
        line = "--" if kind == ZEROS else "-"
        xs, ys = [p.x for p in front], [p.y for p in front]
        ax.step(xs, ys, line, where="post", color=STYLES[kind]["color"], linewidth=1.0)
    best = {p for front in every.values() for p in front}
    for p in points:
        look = {key: value for key, value in STYLES[p.kind].items() if key != "label"}
        alpha = 1.0 if p in best or p.kind in (DENSE, OTHER) else _PALE
        ax.plot(p.x, p.y, markersize=6, linestyle="", alpha=alpha, **look)
    if measure is PERPLEXITY:
        perplexity_axis(ax, [p.y for p in points])
    elif measure is TOP1:
        ax.yaxis.set_major_formatter(lambda value, _: summary.percent(value))
    if axis.less:
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
    ax.grid(axis="both")
    ax.margins(x=0.25, y=0.2)
    ax.set_title(title)
    ax.set_xlabel(axis.label)


def _legend(figure: "Figure", points: Sequence[Point], front: str) -> None:
    """Explain the kinds of points that are there, and the lines."""
    from matplotlib.lines import Line2D

    kinds = [kind for kind in STYLES if any(p.kind == kind for p in points)]
    handles = [Line2D([], [], linestyle="", markersize=6, **STYLES[kind]) for kind in kinds]
    handles.append(Line2D([], [], color=GREY, linewidth=1.0, label=front))
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)


def label_points(
    ax: "Axes", points: Sequence[Point], lines: Iterable[Sequence[Point]] = ()
) -> None:
    """Write each run's name at the nearest place that covers no other name, point or line.

    A thin line joins a name to a point that is not beside it.

    Args:
      ax: Axes that are already laid out.
      points: The runs.
      lines: The fronts that were drawn, as steps.
    """
    frame = ax.get_window_extent()
    at = ax.transData.transform([(p.x, p.y) for p in points])
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    for line in lines:
        corners = ax.transData.transform([(p.x, p.y) for p in line])
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):  # across, then down
            taken += [(x0, y0, x1, y0 + 1), (x1, min(y0, y1), x1 + 1, max(y0, y1))]
    labels = run_names.short([p.name for p in points])
    to_points = 72 / ax.figure.dpi
    for k in sorted(range(len(points)), key=lambda k: (at[k][0], at[k][1])):
        name = textwrap.fill(labels[points[k].name], _NAME_WIDTH)
        text = ax.annotate(
            name,
            (points[k].x, points[k].y),
            (0, 0),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=9,
        )
        box = text.get_window_extent()
        padded = (box.width + 2 * _PAD, box.height + 2 * _PAD)
        x, y = np.add(_nearest_place(at[k], padded, frame.extents, taken), _PAD)
        text.set_position(((x - at[k][0]) * to_points, (y - at[k][1]) * to_points))
        taken.append((x, y, x + box.width, y + box.height))
        near = np.clip(at[k], (x, y), (x + box.width, y + box.height))
        if np.hypot(*(near - at[k])) > _LEADER:
            ax.annotate(
                "",
                (points[k].x, points[k].y),
                tuple((near - at[k]) * to_points),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": GREY,
                    "linewidth": 0.5,
                    "shrinkA": 0,
                    "shrinkB": 3,
                },
            )


def _nearest_place(
    at: np.ndarray,
    size: tuple[float, float],
    frame: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Return the lower left corner of the free box that is nearest to a point, in pixels.

    Args:
      at: The point.
      size: Width and height of the box.
      frame: Left, bottom, right, top of the space; if it has no free place, the nearest is taken.
      taken: Boxes that must not be covered.
    """
    width, height = size
    left = np.arange(frame[0], max(frame[2] - width, frame[0]) + 1, _STEP)
    low = np.arange(frame[1], max(frame[3] - height, frame[1]) + 1, _STEP)
    x, y = (a.ravel() for a in np.meshgrid(left, low))
    free = np.ones(len(x), bool)
    for x0, y0, x1, y1 in taken:
        free &= (x >= x1) | (x + width <= x0) | (y >= y1) | (y + height <= y0)
    off_x = np.maximum(0, np.maximum(x - at[0], at[0] - x - width))
    off_y = np.maximum(0, np.maximum(y - at[1], at[1] - y - height))
    # Of places as near, the one to the right, where a reader expects a name.
    distance = np.round(np.hypot(off_x, off_y), 1) + 1e-3 * (x < at[0])
    if free.any():
        distance[~free] = np.inf
    best = int(np.argmin(distance))
    return float(x[best]), float(y[best])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.y)]


def _height(points: Sequence[Point]) -> float:
    """Return the height of a panel in inches, with room for every run's name."""
    return 3.0 + 0.12 * max(0, len(points) - 6)


def front_svg(title: str, points: Sequence[Point]) -> str:
    """Draw perplexity against the weights left as SVG text; "" without a pruned run.

    Args:
      title: Title of the plot.
      points: The runs; those without a finite perplexity are left out.
    """
    finite = _finite(points)
    if all(p.kind == DENSE for p in finite):
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        _draw(ax, "", WEIGHTS, finite)
        ax.set_ylabel("perplexity")
        _legend(ax.figure, finite, FRONT)  # type: ignore[arg-type]
        _place(ax.figure, [(ax, WEIGHTS, finite)])  # type: ignore[arg-type]

    return render(title, 1, _height(finite) + 0.8, draw)


def _place(
    figure: "Figure",
    panels: Sequence[tuple["Axes", Axis, Sequence[Point]]],
    measure: Measure = PERPLEXITY,
) -> None:
    """Write the names of all panels."""
    figure.draw_without_rendering()  # lays the axes out
    for ax, axis, points in panels:
        label_points(ax, points, fronts(points, axis, measure.less).values())


def save_comparison(
    panels: Mapping[str, Mapping[Axis, Sequence[Point]]],
    path: Path,
    dark: bool = False,
    measure: Measure = PERPLEXITY,
) -> None:
    """Draw the runs to .svg or .png, a row per data set and a column per x axis.

    Lines join the runs that no other run beats. Runs without a finite y are left out.

    Args:
      panels: {data set: {x axis: points}}.
      path: File to write.
      dark: Draw for a dark page, on no background.
      measure: What the y axes show.
    """
    from matplotlib.figure import Figure

    labels = summary.short_names(panels)
    finite = {
        data: {axis: _finite(points) for axis, points in by_axis.items()}
        for data, by_axis in panels.items()
    }
    drawn = [points for by_axis in finite.values() for points in by_axis.values()]
    with style("compare", PALE_INK if dark else INK):
        columns = max(map(len, panels.values()))
        height = len(panels) * max(map(_height, drawn)) + 1.0
        figure = Figure(figsize=(WIDTH * columns, height), layout="constrained")
        grid = figure.subplots(len(panels), columns, squeeze=False)
        placed: list[tuple[Axes, Axis, Sequence[Point]]] = []
        for axes, (data, by_axis) in zip(grid, finite.items(), strict=True):
            for ax in axes[len(by_axis) :]:  # speed may be measured for some data sets alone
                ax.set_axis_off()
            for ax, (axis, points) in zip(axes, by_axis.items(), strict=False):
                title = f"{measure.axis}, {summary.shorten(labels[data])}"
                _draw(ax, title, axis, points, measure)
                placed.append((ax, axis, points))
        front = FRONT if columns == 1 else f"{FRONT} (for speed: of any kind)"
        _legend(figure, [p for points in drawn for p in points], front)
        _place(figure, placed, measure)
        save(figure, path, transparent=dark)
