"""Plot perplexity and zero-shot accuracy, dense against pruned."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.report import summary
from launch.report.svg import BLUE, GREY, INK, finite, render, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Vertical offset and colour of the two bars of a row.
BARS = {"dense": (-0.2, GREY), "pruned": (0.2, BLUE)}
LOG_RANGE = 20  # a larger ratio of perplexities takes a log axis
_LARGEST = 1e100  # axes end here: beyond it, float64 would overflow


def perplexity_bars(perplexity: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw two bars per data set, dense and pruned, with one standard error.

    The axis begins at zero. If the values span more than a factor of 20 it is logarithmic and
    begins at 1, so that a bar's length is the cross-entropy. A value that is not finite is a
    hatched bar to the edge with its name.

    Args:
      perplexity: The report's `perplexity`.

    Returns:
      SVG text, or "" without a data set.
    """
    if not perplexity:
        return ""
    values = [scores.get(model) for scores in perplexity.values() for model in BARS]
    positive = [v for v in finite(values) if v > 0]
    log = bool(positive) and max(positive) > LOG_RANGE * min(positive)
    base, top = (1.0 if log else 0.0), min(max(positive, default=1.0), _LARGEST)
    edge = top**1.55 if log else 1.45 * top  # room on the right for the numbers

    def draw(axes: Sequence["Axes"]) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        (ax,) = axes
        if log:
            ax.set_xscale("log")
        for row, scores in enumerate(perplexity.values()):
            for model, (offset, _) in BARS.items():
                if scores.get(model) is not None:
                    _perplexity_bar(ax, row + offset, scores, model, (base, top))
        labels = summary.short_names(perplexity)
        _rows_axis(ax, [labels[name] for name in perplexity])
        ax.set_xlim(base, edge)
        ax.xaxis.set_major_formatter(lambda value, _: tick(value))
        ax.xaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(nbins=5))
        ax.minorticks_off()
        ax.set_xlabel("perplexity (log axis)" if log else "perplexity")

    return render("Perplexity before and after", 1, 0.55 + 0.62 * len(perplexity), draw)


def _perplexity_bar(
    ax: "Axes", y: float, scores: Mapping[str, Any], model: str, limits: tuple[float, float]
) -> None:
    """Draw one bar at height y between the limits of the axis, with its error and its number."""
    base, top = limits
    value, error = scores[model], scores.get(f"{model}_stderr") or 0.0
    is_finite = math.isfinite(value)
    end = min(max(value, base), top) if is_finite else top
    ax.barh(
        y,
        end - base,
        left=base,
        height=0.36,
        color=BARS[model][1],
        edgecolor=INK,
        linewidth=0.0,
        hatch=None if is_finite else "////",
    )
    right = min(end + error, top)
    if error and is_finite:
        ax.hlines(y, max(end - error, base), right, colors=INK, linewidth=1.0)
    _annotate(ax, right, y, f"{model} {summary.perplexity(value)}")


def accuracy_bars(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw two bars per accuracy, dense and pruned, with one standard error.

    Args:
      tasks: The report's `tasks`.

    Returns:
      SVG text, or "" without an accuracy.
    """
    rows = [metric for metric in summary.metrics(tasks) if metric.fraction]
    if not rows:
        return ""
    values = [value[0] for metric in rows for value in (metric.dense, metric.pruned) if value]

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        for row, metric in enumerate(rows):
            for model, (offset, colour) in BARS.items():
                if value := metric.of(model):
                    accuracy, error = value[0], value[1] or 0.0
                    ax.barh(
                        row + offset,
                        accuracy,
                        height=0.36,
                        color=colour,
                        xerr=error,
                        error_kw={"ecolor": INK, "elinewidth": 1.0},
                    )
                    text = f"{model} {summary.percent(accuracy)}"
                    _annotate(ax, accuracy + error, row + offset, text)
        _rows_axis(ax, [f"{metric.task}, {metric.name}" for metric in rows])
        ax.set_xlim(0, 1.45 * max(values) or 1.0)
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
        ax.locator_params(axis="x", nbins=5)

    return render("Accuracy before and after", 1, 0.55 + 0.62 * len(rows), draw)


def _rows_axis(ax: "Axes", labels: Sequence[str]) -> None:
    """Label one row per pair of bars, the first on top, with vertical grid lines."""
    ax.set_yticks(range(len(labels)), [summary.shorten(label) for label in labels])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="x")


def _annotate(ax: "Axes", x: float, y: float, text: str) -> None:
    ax.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
