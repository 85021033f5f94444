"""Plot perplexity against sparsity for the methods of a sweep."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from launch.report import run_names, summary
from launch.report.svg import COLOURS, INK, MARKERS, perplexity_axis, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_WIDTH = 50  # characters of a line of a curve's name
_LEAST_SPAN = 0.02  # of the axis of sparsity: within it a few stray zeros are no difference


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
      sparsity: Fraction of the prunable weights removed.
      mean: Mean perplexity over seeds.
      std: Sample standard deviation of perplexity over seeds.
    """

    sparsity: float
    mean: float
    std: float


def perplexity_by_sparsity(curves: Mapping[str, Sequence[Point]], dense: float) -> str:
    """Draw a curve per method, with bars of one standard deviation.

    Args:
      curves: Points by name of curve; points that are not finite are left out.
      dense: Perplexity of the dense model, drawn as a dashed line.

    Returns:
      SVG text, or "" without a point.
    """
    finite = {name: [p for p in points if math.isfinite(p.mean)] for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    labels = run_names.short(list(finite))

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        for k, (name, points) in enumerate(finite.items()):
            ax.errorbar(
                [p.sparsity for p in points],
                [p.mean for p in points],
                [p.std if math.isfinite(p.std) else 0.0 for p in points],
                color=COLOURS[k % len(COLOURS)],
                marker=MARKERS[k % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=textwrap.fill(labels[name], _LEGEND_WIDTH),
            )
        ax.axhline(dense, color=INK, linewidth=1.0, linestyle="--")
        perplexity_axis(ax, [dense, *(p.mean for points in finite.values() for p in points)])
        reached = [p.sparsity for points in finite.values() for p in points]
        middle = (min(reached) + max(reached)) / 2
        half = 0.55 * max(max(reached) - min(reached), _LEAST_SPAN)
        ax.set_xlim(middle - half, middle + half)
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
        ax.grid(axis="y")
        ax.set_xlabel("fraction of the prunable weights removed")
        ax.set_ylabel("perplexity")
        ax.figure.legend(loc="outside lower left", frameon=False, fontsize=9)

    return render("Perplexity by sparsity", 1, 2.6 + 0.22 * len(finite), draw)
