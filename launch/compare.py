r"""Compare pruned models: a table, and a plot of quality against size and speed.

python -m launch.compare out/wanda out/flap out/sleb
python -m launch.compare out/* --speed=speed.json --markdown=table.md --latex=table.tex \
  --plot=pareto.svg
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from launch.flags.cli import Flags, run
from launch.report import compare_plot, compare_table, console
from launch.report.compare_plot import Point
from launch.report.compare_table import PARTS, Run, data_sets, rows
from launch.run import export
from models.errors import InputError


def options() -> Flags:
    """Define the flags of `launch.compare`."""
    f = Flags("launch.compare", __doc__ or "", names="directories")
    f.string("speed", None, "output of launch.bench --what=speed --json=FILE for these directories")
    f.string("markdown", None, "file to write the table to, as Markdown")
    f.string("latex", None, "file to write the table to, as a LaTeX tabular")
    f.string("plot", None, "file for a plot of perplexity against size and speed: .svg or .png")
    f.string("plot_dark", None, "file for the same plot for dark pages: .svg or .png")
    return f


def _run(report: Mapping[str, Any], speedup: Mapping[str, float]) -> Run:
    settings = report["settings"]
    extra = [settings.get(key) for key in ("allocation", "refine")]
    extra = [call for call in extra if call not in (None, "uniform", "none")]
    name = ", ".join([report["method"], *extra])
    return Run(name, 1 - report["sparsity"]["total"], report, speedup)


def read(directories: Sequence[str], speed: str | None) -> list[Run]:
    """Read the reports of pruned models.

    Args:
      directories: Output directories of `launch.prune`.
      speed: File of measured speeds, if any.

    Raises:
      InputError: A directory has no report, or the file has none of these directories.
    """
    if not directories:
        raise InputError("no directories were given", "python -m launch.compare DIR DIR ...")
    speedups = _speedups(speed) if speed else {}
    runs = []
    for name in directories:
        path = pathlib.Path(name).expanduser() / export.REPORT
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            runs.append(_run(report, speedups.get(str(pathlib.Path(name)), {})))
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{name} has no readable {export.REPORT}", "give output directories of launch.prune"
            ) from None
    if speed and not any(r.speedup for r in runs):
        raise InputError(
            "has none of these directories",
            "measure them with launch.bench --what=speed --pruned=...",
            field="speed",
            value=speed,
        )
    return runs


def _speedups(file: str) -> dict[str, dict[str, float]]:
    """Return {directory: {part: speed-up}} at the first batch size of a speed benchmark."""
    try:
        by_batch = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["figures"]
        rows = next(iter(by_batch.values()))
        return {
            str(pathlib.Path(name)): {part: float(row["speedup"][part]) for part in PARTS}
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise InputError(
            "is not output of launch.bench --what=speed --json", field="speed", value=file
        ) from None


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """Yield why numbers of one column cannot be compared, one clause each.

    Args:
      runs: The runs of the table.
    """
    if len({json.dumps(r.report["parameters"]["dense"]) for r in runs}) > 1:
        yield "the dense models differ"
    for name in data_sets(runs):
        digests = {
            r.report.get("protocol", {}).get("evaluation", {}).get(name, {}).get("sha256")
            for r in runs
            if name in r.report["perplexity"]
        }
        if len(digests) > 1:
            yield f"the tokens of {name} differ between the runs"


def points(runs: Sequence[Run], data: str) -> dict[str, list[Point]]:
    """Return the plot's points of a data set: {label of the x axis: points}.

    Args:
      runs: The runs.
      data: Name of the data set.
    """
    evaluated = [r for r in runs if data in r.report["perplexity"]]
    timed = [r for r in evaluated if r.speedup]
    dense = Point("dense", 1.0, evaluated[0].report["perplexity"][data]["dense"])

    def pruned(r: Run, x: float) -> Point:
        return Point(r.name, x, r.report["perplexity"][data]["pruned"])

    panels = {compare_plot.PARAMETERS: [dense, *(pruned(r, r.share) for r in evaluated)]}
    if timed:
        for part, label in PARTS.items():
            speeds = [pruned(r, r.speedup[part]) for r in timed]
            panels[f"{label}, times as fast"] = [dense, *speeds]
    return panels


def _write(flag: str, file: str, text: str) -> None:
    try:
        pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as e:
        raise InputError(
            f"cannot be written ({e.strerror})", "choose another place", field=flag, value=file
        ) from None


def main(values: dict[str, Any]) -> None:
    """Print the table and write the files that the flags name."""
    plots = [flag for flag in ("plot", "plot_dark") if values[flag]]
    for flag in plots:
        if pathlib.Path(values[flag]).suffix not in (".svg", ".png"):
            raise InputError("must end in .svg or .png", field=flag, value=values[flag])
    runs = read(values["directories"], values["speed"])
    table = rows(runs)
    console.show_wide(str(runs[0].report["model"]), table, Console())
    for difference in differences(runs):
        console.note(f"warning: {difference}")
    if values["markdown"]:
        _write("markdown", values["markdown"], compare_table.markdown(table))
    if values["latex"]:
        _write("latex", values["latex"], compare_table.latex(table))
    panels = {name: points(runs, name) for name in data_sets(runs)} if plots else {}
    for flag in plots:
        dark = flag == "plot_dark"
        compare_plot.save_comparison(panels, pathlib.Path(values[flag]), dark)


if __name__ == "__main__":
    sys.exit(run(options(), main))
