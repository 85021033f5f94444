"""What a comparison of MLPRank's scorers leaves: the table in the terminal, results.json, accuracy.csv and accuracy.svg."""

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
DENSE = "dense"  # what stands for a scorer where nothing is removed


class Row(NamedTuple):
    """One network as pruned, or dense: accuracies are fractions of images, `parameters` how many numbers are left."""

    scorer: str
    ratio: float
    seed: int
    valid: float
    test: float
    parameters: int


def names_of(rows: Sequence[Row]) -> tuple[list[str], list[float]]:
    """The scorers and the ratios, in their order."""
    pruned = [r for r in rows if r.scorer != DENSE]
    return list(dict.fromkeys(r.scorer for r in pruned)), list(
        dict.fromkeys(r.ratio for r in pruned)
    )


def at(rows: Sequence[Row], scorer: str, ratio: float, part: str = "test") -> Spread:
    """The accuracy on a part ("valid", "test") of one scorer at one ratio."""
    return spread([getattr(r, part) for r in rows if r.scorer == scorer and r.ratio == ratio])


def average(rows: Sequence[Row], scorer: str, part: str = "test") -> Spread:
    """Each seed's accuracy averaged over the ratios, then over the seeds."""
    seeds = dict.fromkeys(r.seed for r in rows)
    return spread(
        [
            float(
                np.mean([getattr(r, part) for r in rows if r.scorer == scorer and r.seed == seed])
            )
            for seed in seeds
        ]
    )


def table(title: str, rows: Sequence[Row]) -> Table:
    """Test accuracy in percent, a line for each ratio and one for their average, the best of each line marked."""
    scorers, ratios = names_of(rows)
    dense = at(rows, DENSE, 0.0)
    seeds = len({r.seed for r in rows})
    caption = f"test accuracy, % ± std over {seeds} seeds; * best of its line; dense {_cell(dense)}"
    # Narrow gaps: six scorers fit a terminal of 80 columns.
    shown = Table(title=Text(title), caption=Text(caption), box=SIMPLE_HEAD, padding=0)
    shown.title_justify = shown.caption_justify = "left"
    for heading in ("gone", *scorers):
        shown.add_column(Text(heading), justify="right", overflow="fold")
    for ratio in ratios:
        shown.add_row(f"{ratio:.0%}", *_marked([at(rows, name, ratio) for name in scorers]))
    shown.add_section()
    shown.add_row("average", *_marked([average(rows, name) for name in scorers]))
    return shown


def _cell(s: Spread) -> str:
    return f"{100 * s.mean:.1f}±{100 * s.std:.1f}"


def _marked(line: Sequence[Spread]) -> list[Text]:
    best = max(s.mean for s in line)
    return [
        Text(_cell(s) + "*", style="bold") if s.mean == best else Text(_cell(s) + " ") for s in line
    ]


def results(
    settings: Mapping[str, Any], rows: Sequence[Row], protocol: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The content of results.json: every figure of the table, the same on the validation images, and the numbers left."""
    scorers, ratios = names_of(rows)

    def figures(scorer: str, ratio: float) -> dict[str, Any]:
        size = spread([r.parameters for r in rows if r.scorer == scorer and r.ratio == ratio]).mean
        return {part: at(rows, scorer, ratio, part)._asdict() for part in ("valid", "test")} | {
            "parameters": size
        }

    return {
        "settings": dict(settings),
        "protocol": dict(protocol),
        "dense": figures(DENSE, 0.0),
        "pruned": [
            {"scorer": name, "ratio": ratio} | figures(name, ratio)
            for name, ratio in itertools.product(scorers, ratios)
        ],
        "average": {
            name: {part: average(rows, name, part)._asdict() for part in ("valid", "test")}
            for name in scorers
        },
        "seconds": seconds,
    }


def plot(title: str, rows: Sequence[Row]) -> str:
    """Test accuracy against the fraction removed as SVG text: a line for each scorer, a band of one standard deviation."""
    import matplotlib.style
    from matplotlib.figure import Figure

    scorers, ratios = names_of(rows)
    dense = at(rows, DENSE, 0.0)
    # "default" first: the user's own matplotlibrc must not change the plot. The salt names the SVG's internal references.
    with matplotlib.style.context(
        ["default", {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}]
    ):
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        ax = figure.subplots()
        for i, name in enumerate(scorers):
            points = sorted(
                [(0.0, dense), *((ratio, at(rows, name, ratio)) for ratio in ratios if ratio > 0)]
            )
            x, mean, std = (
                100 * np.array(v) for v in zip(*((ratio, *s) for ratio, s in points), strict=True)
            )
            colour = COLOURS[i % len(COLOURS)]
            ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
            ax.plot(
                x,
                mean,
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.5,
                label=name,
            )
        ax.set(title=title, xlabel="hidden units removed, %", ylabel="test accuracy, %")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
    return file.getvalue()


def write(output: Path, title: str, content: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the three files; `output` appears when all are complete. InputError when it cannot be written."""
    with staged(output, RESULTS) as directory:
        (directory / RESULTS).write_text(json.dumps(content, indent=2) + "\n")
        with (directory / "accuracy.csv").open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
        (directory / "accuracy.svg").write_text(plot(title, rows))
