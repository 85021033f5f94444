"""Report a comparison of MLPRank's scorers as table, results.json, accuracy.csv, accuracy.svg."""

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from launch.report.seeds import Spread, spread
from launch.report.svg import COLOURS, MARKERS
from launch.run.staging import staged

RESULTS = "results.json"
DENSE = "dense"  # scorer of a row where nothing is removed


class Row(NamedTuple):
    """One network, dense or pruned.

    Attributes:
      scorer: The scorer, or DENSE.
      ratio: Fraction of the hidden units that is removed.
      seed: Seed of the network.
      valid: Accuracy on the validation images, a fraction.
      test: Accuracy on the test images, a fraction.
      parameters: Number of parameters that are left.
    """

    scorer: str
    ratio: float
    seed: int
    valid: float
    test: float
    parameters: int


def scorers_and_ratios(rows: Sequence[Row]) -> tuple[list[str], list[float]]:
    """Return the scorers and the ratios of the pruned networks, in the order of the rows."""
    pruned = [row for row in rows if row.scorer != DENSE]
    scorers = list(dict.fromkeys(row.scorer for row in pruned))
    ratios = list(dict.fromkeys(row.ratio for row in pruned))
    return scorers, ratios


def accuracy(rows: Sequence[Row], scorer: str, ratio: float, part: str = "test") -> Spread:
    """Return one scorer's accuracy at one ratio, over the seeds.

    Args:
      rows: All networks.
      scorer: The scorer.
      ratio: The ratio.
      part: Images to count, "valid" or "test".
    """
    return spread([getattr(r, part) for r in rows if r.scorer == scorer and r.ratio == ratio])


def mean_accuracy(rows: Sequence[Row], scorer: str, part: str = "test") -> Spread:
    """Return one scorer's accuracy, averaged over the ratios of each seed, then over the seeds.

    Args:
      rows: All networks.
      scorer: The scorer.
      part: Images to count, "valid" or "test".
    """
    by_seed: dict[int, list[float]] = {row.seed: [] for row in rows}
    for row in rows:
        if row.scorer == scorer:
            by_seed[row.seed].append(getattr(row, part))
    return spread([float(np.mean(values)) for values in by_seed.values()])


def table(title: str, rows: Sequence[Row]) -> Table:
    """Tabulate test accuracies in percent: a line for each ratio, then their average.

    Args:
      title: Title of the table.
      rows: All networks.

    Returns:
      The table, with the best scorer of every line marked.
    """
    scorers, ratios = scorers_and_ratios(rows)
    dense = accuracy(rows, DENSE, 0.0)
    seeds = len({row.seed for row in rows})
    caption = (
        f"test accuracy, % ± std over {seeds} seeds; * best of its line; dense {_percent(dense)}"
    )
    # Narrow gaps: six scorers fit a terminal of 80 columns.
    result = Table(title=Text(title), caption=Text(caption), box=SIMPLE_HEAD, padding=0)
    result.title_justify = "left"
    result.caption_justify = "left"
    for heading in ("removed", *scorers):
        result.add_column(Text(heading), justify="right", overflow="fold")
    for ratio in ratios:
        cells = _mark_best([accuracy(rows, scorer, ratio) for scorer in scorers])
        result.add_row(f"{ratio:.0%}", *cells)
    result.add_section()
    result.add_row("average", *_mark_best([mean_accuracy(rows, scorer) for scorer in scorers]))
    return result


def _percent(s: Spread) -> str:
    """Format mean and standard deviation in percent."""
    return f"{100 * s.mean:.1f}±{100 * s.std:.1f}"


def _mark_best(line: Sequence[Spread]) -> list[Text]:
    """Format a line's accuracies and mark the best, several if they are equal."""
    best = max(s.mean for s in line)
    return [
        Text(f"{_percent(s)}*", style="bold") if s.mean == best else Text(f"{_percent(s)} ")
        for s in line
    ]


def results(
    settings: Mapping[str, Any], rows: Sequence[Row], protocol: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
      settings: Settings of the run.
      rows: All networks.
      protocol: Versions and numbers of images.
      seconds: Duration of the run.

    Returns:
      Accuracies of every scorer and ratio on the validation and test images, and mean numbers of
      parameters.
    """
    scorers, ratios = scorers_and_ratios(rows)

    def figures(scorer: str, ratio: float) -> dict[str, Any]:
        parameters = [r.parameters for r in rows if r.scorer == scorer and r.ratio == ratio]
        return {
            "valid": accuracy(rows, scorer, ratio, "valid")._asdict(),
            "test": accuracy(rows, scorer, ratio, "test")._asdict(),
            "parameters": spread(parameters).mean,
        }

    return {
        "settings": dict(settings),
        "protocol": dict(protocol),
        "dense": figures(DENSE, 0.0),
        "pruned": [
            {"scorer": scorer, "ratio": ratio, **figures(scorer, ratio)}
            for scorer, ratio in itertools.product(scorers, ratios)
        ],
        "average": {
            scorer: {
                "valid": mean_accuracy(rows, scorer, "valid")._asdict(),
                "test": mean_accuracy(rows, scorer, "test")._asdict(),
            }
            for scorer in scorers
        },
        "seconds": seconds,
    }


def plot(title: str, rows: Sequence[Row]) -> str:
    """Plot test accuracy against the fraction removed.

    Args:
      title: Title of the plot.
      rows: All networks.

    Returns:
      SVG text: a line for each scorer with a band of one standard deviation.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    scorers, ratios = scorers_and_ratios(rows)
    dense = accuracy(rows, DENSE, 0.0)
    # "default" first: the user's own matplotlibrc must not change the plot. The salt names the
    # SVG's internal references.
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        ax = figure.subplots()
        for i, scorer in enumerate(scorers):
            # Every curve starts at the dense network; a ratio of 0 would repeat that point.
            points = {0.0: dense}
            points.update((r, accuracy(rows, scorer, r)) for r in sorted(ratios) if r > 0)
            x = 100 * np.array(list(points))
            mean = 100 * np.array([s.mean for s in points.values()])
            std = 100 * np.array([s.std for s in points.values()])
            colour = COLOURS[i % len(COLOURS)]
            marker = MARKERS[i % len(MARKERS)]
            ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
            ax.plot(x, mean, color=colour, marker=marker, markersize=4, linewidth=1.5, label=scorer)
        ax.set(title=title, xlabel="hidden units removed, %", ylabel="test accuracy, %")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
    return file.getvalue()


def write(output: Path, title: str, content: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the three files of the report.

    Args:
      output: Their directory, which appears when all are complete.
      title: Title of the plot.
      content: Content of results.json.
      rows: All networks.

    Raises:
      InputError: The directory cannot be written.
    """
    with staged(output, RESULTS) as stage:
        directory = stage.result
        (directory / RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with (directory / "accuracy.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *rows])
        (directory / "accuracy.svg").write_text(plot(title, rows), encoding="utf-8")
