"""Plot the speed of dense and pruned checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.report import summary
from launch.report.svg import GREY, INK, TEAL, WIDTH, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_speed(measurements: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw prompt seconds and tokens per second of each model to .svg or .png.

    Bars are medians; thin lines reach from the slowest run to the fastest.

    Args:
      measurements: {batch size: {model: measurement}}, as `launch.benchmarks.speed` writes them.
      path: File to write.
    """
    from matplotlib.figure import Figure

    most = max(map(len, measurements.values()))
    height = 0.6 + len(measurements) * (0.5 + 0.35 * most)
    with style("speed"):
        figure = Figure(figsize=(2 * WIDTH, height), layout="constrained")
        grid = figure.subplots(len(measurements), 2, sharey="row", squeeze=False)
        for axes, (batch, rows) in zip(grid, measurements.items(), strict=True):
            for ax, part in zip(axes, ("prompt", "generation"), strict=True):
                _bars(ax, rows, part)
            axes[0].set_title(f"prompt, seconds (batch {batch})")
            axes[1].set_title(f"generation, tokens/s (batch {batch})")
        save(figure, path)


def _bars(ax: "Axes", rows: Mapping[str, Mapping[str, Any]], part: str) -> None:
    """Draw a bar per model: seconds of the prompt, or tokens per second of the generation."""
    for y, row in enumerate(rows.values()):
        seconds = (row["median"][part], min(row["seconds"][part]), max(row["seconds"][part]))
        if part == "prompt":
            median, low, high = seconds
        else:
            median, low, high = (row["generated"] / s for s in seconds)
        ax.barh(y, median, height=0.7, color=TEAL if y else GREY)
        ax.hlines(y, low, high, colors=INK, linewidth=1.0)
        ax.annotate(f"{median:.3g}", (0, y), xytext=(3, 0), textcoords="offset points", va="center")
    labels = summary.short_names(rows)
    ax.set_yticks(range(len(rows)), [summary.shorten(labels[name]) for name in rows])
    if not ax.yaxis_inverted():  # the two panels share the axis
        ax.invert_yaxis()
