"""The plot of a sweep: what each method pays for its sparsity, as SVG text like the report's plots."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from launch.report import plots, summary
from launch.report.svg import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPAN = 20  # a larger ratio of perplexities takes a log axis


class Point(NamedTuple):
    """A sparsity, and a perplexity's mean and standard deviation over seeds."""

    sparsity: float
    mean: float
    std: float


def perplexity_by_sparsity(curves: Mapping[str, Sequence[Point]], dense: float) -> str:
    """A line for each of `curves`, bars of one standard deviation, a dashed line at the dense model's perplexity.

    Points that are not finite are left out. Returns SVG text, or "" with no point to draw.
    """
    finite = {name: [p for p in points if math.isfinite(p.mean)] for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        for k, (name, points) in enumerate(finite.items()):
            x, mean, std = zip(*points, strict=True)
            bars, colour = [s if math.isfinite(s) else 0.0 for s in std], COLOURS[k % len(COLOURS)]
            marker = MARKERS[k % len(MARKERS)]
            ax.errorbar(
                x,
                mean,
                bars,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=name,
            )
        ax.axhline(dense, color=plots.INK, linewidth=1.0, linestyle="--")
        if max(p.mean for points in finite.values() for p in points) > SPAN * dense:
            ax.set_yscale("log")
            ax.minorticks_off()
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
        ax.yaxis.set_major_formatter(lambda value, _: plots.tick(value))
        ax.grid(axis="y")
        ax.set_xlabel("removed of the prunable weights")
        ax.set_ylabel("perplexity")
        ax.figure.legend(loc="outside lower left", frameon=False, fontsize=9)

    return plots.render("Perplexity by sparsity", 1, 2.6 + 0.22 * len(finite), draw)
