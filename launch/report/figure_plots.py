"""Draw the figures that a method adds to the report, by their type."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from launch.report import summary
from launch.report.svg import (
    BLUE,
    COLOURS,
    INK,
    MARKERS,
    ORANGE,
    TEAL,
    block_axis,
    finite,
    render,
    tick,
)
from pruning.figures import KeptMap, LineSeries, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIT_COLOURS = {"heads": BLUE, "neurons": ORANGE}  # other units are teal
_PEAK = 5  # a cut axis ends at this many times the spread of the lower half of the values
_LOG_RANGE = 100  # a larger ratio of positive values takes a log axis
_ABSENT = 0.15  # opacity of units that a narrower block never had


def line_series(figure: LineSeries) -> str:
    """Draw a LineSeries; values that are unknown or not finite are left out.

    Args:
      figure: The lines.

    Returns:
      SVG text, or "" without a value.
    """
    known = sorted(finite(value for line in figure.series.values() for value in line))
    if not known:
        return ""
    longest = max(map(len, figure.series.values()))
    legend = len(figure.series) > 1 and not figure.ordered

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        xs: Sequence[float] = range(longest) if figure.x is None else figure.x
        if figure.x is None:
            block_axis(axes, range(longest), figure.x_label)
        ax.grid(axis="y")
        ax.set_xlabel(figure.x_label)
        ax.set_ylabel(figure.y_label)
        for k, (name, line) in enumerate(figure.series.items()):
            points = {i: v for i, v in enumerate(line) if v is not None and math.isfinite(v)}
            _line(ax, figure, k, [xs[i] for i in points], list(points.values()), name)
            chosen = [i for i in figure.marked.get(name, ()) if i in points]
            ax.plot(
                [xs[i] for i in chosen],
                [points[i] for i in chosen],
                color=ORANGE,
                marker="o",
                markersize=7,
                linestyle="",
            )
        if figure.level is not None:
            ax.axhline(figure.level, color=INK, linewidth=1.0, linestyle="--")
        _y_axis(ax, figure, known)
        if figure.fraction:
            ax.set_title(summary.percent_span(known), loc="right")
        if legend:
            ax.figure.legend(loc="outside lower left", frameon=False, fontsize=9)

    height = 2.4 + (0.22 * len(figure.series) if legend else 0.0)
    return render(figure.title, 1, height, draw)


def _line(
    ax: "Axes", figure: LineSeries, k: int, xs: Sequence[float], ys: Sequence[float], name: str
) -> None:
    """Draw line k, darker than the one before if the lines are ordered, else in its own colour."""
    if figure.ordered:
        alpha = 0.3 + 0.7 * (k + 1) / len(figure.series)
        ax.plot(xs, ys, color=BLUE, alpha=alpha, marker=".", linewidth=1.0)
    else:
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        ax.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)


def _y_axis(ax: "Axes", figure: LineSeries, known: Sequence[float]) -> None:
    """Set the scale and the ticks of the y axis.

    Args:
      ax: The axes.
      figure: The lines.
      known: Their finite values, sorted.
    """
    low, high = known[0], known[-1]
    if figure.cut_peaks:
        top = low + _PEAK * (known[len(known) // 2] - low)
        if top > low:
            ax.set_ylim(top=min(top, high + 0.05 * (high - low)))
    elif low > 0 and high > _LOG_RANGE * low:
        ax.set_yscale("log")
        ax.minorticks_off()
    if figure.fraction:
        ax.set_ylim(bottom=0.0)
        ax.yaxis.set_major_formatter(lambda value, _: summary.percent(value))
    else:
        ax.yaxis.set_major_formatter(lambda value, _: tick(value))


def kept_map(figure: KeptMap) -> str:
    """Draw a KeptMap: a row per block, kept units coloured, paler where only a part is kept.

    Args:
      figure: The map.

    Returns:
      SVG text, or "" without units.
    """
    if not figure.kept or not figure.units:
        return ""
    blocks, units = len(figure.kept), figure.units

    def draw(axes: Sequence["Axes"]) -> None:
        from matplotlib.colors import to_rgb
        from matplotlib.ticker import MaxNLocator

        (ax,) = axes
        share = np.asarray(figure.kept, np.float64)  # None, which becomes NaN: no such unit
        absent = np.isnan(share)[..., None]
        colour = np.where(absent, to_rgb(INK), to_rgb(UNIT_COLOURS.get(figure.unit, TEAL)))
        opacity = np.where(absent, _ABSENT, share[..., None])
        ax.imshow(
            np.concatenate([colour, opacity], axis=2),
            aspect="auto",
            interpolation="none",
            extent=(-0.5, units - 0.5, blocks - 0.5, -0.5),
        )
        edges = np.arange(1, blocks) - 0.5
        ax.hlines(edges, -0.5, units - 0.5, colors=INK, linewidth=0.3, alpha=0.4)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.spines[["top", "right"]].set_visible(True)
        ax.set_xlabel(figure.unit.removesuffix("s"))
        if blocks > 1:
            ax.set_ylabel("block")
        else:
            ax.set_yticks([])

    return render(figure.title, 1, min(0.5 + 0.16 * blocks, 4.0), draw)


def table_cells(table: Table) -> list[list[str]]:
    """Format the cells of a Table: fractions in percent, other numbers with four digits.

    Args:
      table: The table.
    """

    def text(column: str, cell: str | float | None) -> str:
        if cell is None:
            return summary.ABSENT
        if isinstance(cell, str):
            return cell
        if column in table.fractions:
            return summary.percent(cell)
        return str(cell) if isinstance(cell, int) else f"{cell:.4g}"

    return [
        [text(column, cell) for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
