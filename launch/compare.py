r"""Compare pruned models: a table, and a plot of quality against size and speed.

python -m launch.compare out/wanda out/flap out/sleb
python -m launch.compare out/* --speed=speed.json --markdown=table.md --latex=table.tex \
  --plot=pareto.svg
"""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from launch.flags.cli import Flags, run
from launch.report import (
    compare_plot,
    compare_table,
    console,
    medians,
    recovered,
    run_names,
    summary,
)
from launch.report.compare_plot import DENSE, OTHER, WEIGHTS, Axis, Point, speed_axis
from launch.report.compare_table import PARTS, Marks, Run, data_sets, marks_of, rows
from launch.report.measures import MEASURES, PERPLEXITY, Measure
from launch.run import export
from models.errors import InputError
from models.untrusted import UserFile, user_path


def options() -> Flags:
    """Define the flags of `launch.compare`."""
    f = Flags("launch.compare", __doc__ or "", names="directories")
    f.string("speed", None, "output of launch.bench --what=speed --json=FILE for these directories")
    f.string("markdown", None, "file to write the table to, as Markdown")
    f.string("latex", None, "file to write the table to, as a LaTeX tabular")
    f.string("plot", None, "file for a plot of quality against size and speed: .svg or .png")
    f.string("plot_dark", None, "file for the same plot for dark pages: .svg or .png")
    f.choice("measure", "perplexity", tuple(MEASURES), "quality on the y axis of the plots")
    f.boolean(
        "median", False, "one row for runs that differ in seed and calibration_batch alone: medians"
    )
    return f


def read(directories: Sequence[str], speed: str | None, repeated: bool = False) -> list[Run]:
    """Read the reports of pruned models.

    Args:
      directories: Output directories of `launch.prune`.
      speed: File of measured speeds, if any.
      repeated: Join the runs that differ in seed and micro-batch alone to one with the medians.

    Raises:
      InputError: A directory has no report, or the file has none of these directories.
    """
    if not directories:
        raise InputError("no directories were given", "python -m launch.compare DIR DIR ...")
    speedups = _speedups(speed) if speed else {}
    reports = [_read_report(name) for name in directories]
    speeds = [speedups.get(str(pathlib.Path(directory)), {}) for directory in directories]
    if repeated:
        groups = medians.of_reports(reports)
        reports = [medians.median([reports[k] for k in group]) for group in groups]
        speeds = [medians.median([speeds[k] for k in group]) for group in groups]
        directories = [directories[group[0]] for group in groups]
    names = run_names.of_reports(reports, directories)
    runs = [Run(*run) for run in zip(names, reports, speeds, strict=True)]
    if speed and not any(r.speedup for r in runs):
        raise InputError(
            "has none of these directories",
            "measure them with launch.bench --what=speed --pruned=...",
            field="speed",
            value=speed,
        )
    return runs


def _read_report(directory: str) -> dict[str, Any]:
    """Read the report of one directory and check the parts that the comparison needs."""
    try:
        report = UserFile(user_path(directory, "directories") / export.REPORT).read_json()
        for key in ("settings", "sparsity", "parameters", "bytes", "perplexity", "seconds"):
            report[key].items()
        report.get("agreement", {}).items()
        report["method"], report["sparsity"]["total"], report["parameters"]["dense"]
        return dict(recovered.final(report))
    except (InputError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{directory} has no readable {export.REPORT}",
            "give output directories of launch.prune",
        ) from None


def _speedups(file: str) -> dict[str, dict[str, float]]:
    """Return {directory: {part: speed-up}} at the first batch size of a speed benchmark."""
    try:
        by_batch = UserFile(user_path(file, "speed")).read_json()["figures"]
        rows = next(iter(by_batch.values()))
        return {
            str(pathlib.Path(name)): {part: float(row["speedup"][part]) for part in PARTS}
            for name, row in rows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise InputError(
            "is not output of launch.bench --what=speed --json", field="speed", value=file
        ) from None


def points(
    runs: Sequence[Run], marks: Marks, data: str, measure: Measure = PERPLEXITY
) -> dict[Axis, list[Point]]:
    """Return the plot's points of a data set by x axis.

    Args:
      runs: The runs.
      marks: Marks of the runs that cannot be compared with the others.
      data: Name of the data set.
      measure: Quality on the y axis.

    Returns:
      The points; empty if no run has the measure.
    """
    evaluated = {k: r for k, r in enumerate(runs) if measure.of(r.report, data) is not None}
    timed = {k: r for k, r in evaluated.items() if r.speedup}
    usual = (k for k in evaluated if (k, data) not in marks.data and k not in marks.model)
    first = next(usual, None)
    if first is None:
        return {}
    dense = Point("dense", 1.0, _known(measure.of_dense(evaluated[first].report, data)), DENSE)

    def pruned(k: int, x: float) -> Point:
        r = runs[k]
        mark = marks.model.get(k, "") + marks.data.get((k, data), "")
        kind = OTHER if mark else compare_plot.kind_of(r.stored, r.total)
        return Point(r.name + mark, x, _known(measure.of(r.report, data)), kind)

    panels = {WEIGHTS: [dense, *(pruned(k, 1 - r.total) for k, r in evaluated.items())]}
    if timed:
        for part, label in PARTS.items():
            speeds = [pruned(k, r.speedup[part]) for k, r in timed.items()]
            panels[speed_axis(label)] = [dense, *speeds]
    return panels


def _known(value: float | None) -> float:
    """Return a value; NaN, which no plot shows, if there is none."""
    return math.nan if value is None else value


def _panels(runs: Sequence[Run], marks: Marks, measure: Measure) -> dict[str, dict[Axis, Any]]:
    """Return the points of the plots by data set and x axis.

    Raises:
      InputError: No run has the measure.
    """
    panels = {name: points(runs, marks, name, measure) for name in data_sets(runs)}
    panels = {name: by_axis for name, by_axis in panels.items() if by_axis}
    if not panels:
        raise InputError(
            "is in none of the reports",
            "prune the models again, or leave it out",
            field="measure",
            value=measure.key,
        )
    return panels


def _write(flag: str, file: str, text: str) -> None:
    try:
        pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise InputError(
            f"cannot be written ({e.strerror})", "choose another place", field=flag, value=file
        ) from None


def _narrow(runs: Sequence[Run], marks: Marks) -> list[list[str]]:
    """Return the table for a terminal, without what its other columns say as well.

    Calls lose their arguments where a name stays its own without. The count of parameters is left
    out: the share removed and the size stay.
    """
    short = run_names.short([r.name for r in runs])
    table = rows([r._replace(name=short[r.name]) for r in runs], marks)
    left_out = table[0].index("parameters")
    return [row[:left_out] + row[left_out + 1 :] for row in table]


def main(values: dict[str, Any]) -> None:
    """Print the table and write the files that the flags name."""
    plots = [flag for flag in ("plot", "plot_dark") if values[flag]]
    for flag in plots:
        if pathlib.Path(values[flag]).suffix not in (".svg", ".png"):
            raise InputError("must end in .svg or .png", field=flag, value=values[flag])
    measure = MEASURES[values["measure"]]
    if measure is not PERPLEXITY and not plots:
        raise InputError(
            "does nothing without `plot`",
            "give both, or leave it out",
            field="measure",
            value=measure.key,
        )
    runs = read(values["directories"], values["speed"], values["median"])
    marks = marks_of(runs)
    table = rows(runs, marks)
    title = summary.last_component(str(runs[0].report["model"]))
    console.show_wide(title, _narrow(runs, marks), Console())
    for note in marks.notes:
        console.note(f"warning: not comparable: {note}")
    if values["markdown"]:
        _write("markdown", values["markdown"], compare_table.markdown(table, marks.notes))
    if values["latex"]:
        _write("latex", values["latex"], compare_table.latex(table, marks.notes))
    panels = _panels(runs, marks, measure) if plots else {}
    for flag in plots:
        dark = flag == "plot_dark"
        compare_plot.save_comparison(panels, pathlib.Path(values[flag]), dark, measure)


if __name__ == "__main__":
    sys.exit(run(options(), main))
