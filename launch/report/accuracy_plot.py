"""The report's plot of zero-shot accuracy."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.report import summary
from launch.report.plots import BLUE, GREY, INK, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy_bars(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Two bars for each accuracy of the report's `tasks`, dense and pruned, with a line one standard error to both sides.

    Returns SVG text, or "" without an accuracy.
    """
    rows = [metric for metric in summary.metrics(tasks) if metric.fraction]
    if not rows:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        for y, metric in enumerate(rows):
            for offset, which, value, colour in (
                (-0.2, "dense", metric.dense, GREY),
                (0.2, "pruned", metric.pruned, BLUE),
            ):
                if value is not None:
                    error = value[1] or 0.0
                    ax.barh(
                        y + offset,
                        value[0],
                        height=0.36,
                        color=colour,
                        xerr=error,
                        error_kw={"ecolor": INK, "elinewidth": 1.0},
                    )
                    says = f"{which} {summary.percent(value[0])}"
                    ax.annotate(
                        says,
                        (value[0] + error, y + offset),
                        (4, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=9,
                    )
        ax.set_yticks(
            range(len(rows)), [summary.shorten(f"{metric.task}, {metric.name}") for metric in rows]
        )
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(
            0,
            1.45
            * max(value[0] for metric in rows for value in (metric.dense, metric.pruned) if value)
            or 1.0,
        )
        ax.xaxis.set_major_formatter(lambda value, _: summary.percent(value))
        ax.locator_params(axis="x", nbins=5)
        ax.grid(axis="x")

    return render("Accuracy before and after", 1, 0.55 + 0.62 * len(rows), draw)
