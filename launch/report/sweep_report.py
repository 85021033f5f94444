"""Write the files of a sweep: sweep.json, sweep.csv and sweep.html, and print its table."""

import csv
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from calibration.journal import write_durably
from launch.report import (
    compare_plot,
    html,
    recovered,
    run_names,
    summary,
    sweep_plot,
    sweep_table,
)
from launch.report.console import show_wide
from launch.report.figures import Plot
from launch.report.sweep_table import PRUNED, Column, finished_row, pending_row
from launch.trials.trial import Trial

INDEX = "sweep.json"
# Columns of sweep.csv in their order; those of quality and the error follow.
SETTINGS = (
    *("trial", "state", "method", "allocation", "refine", "sparsity", "target", "pattern", "seed"),
)
RESULTS = ("reached", "total", "parameters", "stored", "bytes", "seconds")


class Board:
    """States and results of a sweep's trials, and the files that hold them.

    Args:
      output: Directory of the sweep.
      settings: Values of the sweep's flags.
      possible: Trials to run.
      impossible: Trials that cannot be run, each with the reason.
    """

    def __init__(
        self,
        output: pathlib.Path,
        settings: Mapping[str, Any],
        possible: Sequence[Trial],
        impossible: Sequence[tuple[Trial, str]],
    ):
        self._output = output
        self._settings = dict(settings)
        self._rows = {t.name: pending_row(t, "waiting") for t in possible}
        self._rows |= {t.name: pending_row(t, "left out", why) for t, why in impossible}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return one row per trial, as `pending_row` and `finished_row` make them."""
        return list(self._rows.values())

    @property
    def errors(self) -> dict[str, str]:
        """Return the reason for each failure by name of trial."""
        return {row["trial"]: row["error"] for row in self.rows if row["state"] == "failed"}

    def update(self, trial: Trial, error: str | None = None) -> bool:
        """Read a trial's result from its report.

        Args:
          trial: The trial.
          error: Reason for its failure, if it failed.

        Returns:
          True if the trial is finished.
        """
        report = trial.report() if error is None else None
        if report:
            self._rows[trial.name] = finished_row(trial, recovered.final(report))
            return True
        self._rows[trial.name] = pending_row(trial, "failed" if error else "waiting", error or "")
        return False

    def progress_line(self, trial: Trial) -> str:
        """Return one line with the sweep's progress and the result of a trial that ended."""
        rows = [r for r in self.rows if r["state"] != "left out"]
        done = sum(r["state"] != "waiting" for r in rows)
        row = self._rows[trial.name]
        data = [column.removeprefix(PRUNED) for column in row if column.startswith(PRUNED)]
        labels = summary.short_names(data)
        results = [
            f"perplexity {summary.perplexity(row[PRUNED + name])} ({labels[name]})" for name in data
        ]
        result = ", ".join(results) or f"failed: {row['error']}"
        return f"{done} of {len(rows)}: {trial.name}: {result}"

    def save(self) -> None:
        """Write sweep.json and sweep.csv, each atomically."""
        self._output.mkdir(exist_ok=True)
        content = {"settings": self._settings, "trials": self.rows}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_durably(self._output / INDEX, text.encode())
        quality = [column for row in self.rows for column in row if column != "error"]
        names = dict.fromkeys([*SETTINGS, *RESULTS, *quality, "error"])
        file = io.StringIO()
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_durably(self._output / "sweep.csv", file.getvalue().encode())

    def publish(self) -> None:
        """Write sweep.json, sweep.csv and sweep.html."""
        self.save()
        write_durably(self._output / "sweep.html", self._html().encode())

    def _html(self) -> str:
        quality, lines = sweep_table.columns(self.rows), sweep_table.lines(self.rows)
        measured = [column for column in quality if column.kind == "perplexity"]
        plots = [plot for column in measured for plot in self._plots(lines, column)]
        return html.template("sweep.html.j2").render(
            model=summary.last_component(str(self._settings["model"])),
            settings=self._settings,
            plots=[plot for plot in plots if plot.svg],
            table=sweep_table.table(self.rows),
            trials=[self._trial_cells(row, quality) for row in self.rows],
            finished=sum(line.finished for line in lines),
            planned=sum(line.trials for line in lines),
            quality=[c.heading for c in quality],
        )

    @staticmethod
    def _plots(lines: Sequence[sweep_table.Line], column: Column) -> list[Plot]:
        """Return a data set's curves by sparsity, and its plot against what is left."""
        heading = f"Perplexity, {column.label}"
        caption = (
            "Mean over seeds against the fraction of the prunable weights removed; bars: one "
            f"standard deviation. Dashed: the dense model, {column.text(column.dense)}. "
            "Lower is better."
        )
        curves = sweep_table.curves(lines, column.name)
        svg = sweep_plot.perplexity_by_sparsity(curves, column.dense)
        against = (
            "Mean over seeds against the weights that are left and not zero. Zeros that stay "
            "stored make a model no smaller, so such models have a line of their own. Differences "
            f"of less than half a point count as none. Dense model: {column.text(column.dense)}."
        )
        title = f"{heading}, against the weights left"
        points = sweep_table.front_points(lines, column)
        front = compare_plot.front_svg(title, points)
        return [Plot(heading, caption, svg), Plot(title, against, front)]

    @staticmethod
    def _trial_cells(
        row: Mapping[str, Any], quality: Sequence[Column]
    ) -> tuple[str, str, str, list[str]]:
        """Return a trial's name, state, error, and its quality, sparsity and size as text."""
        cells = [c.text(row.get(f"{c.kind}:{c.name}")) for c in quality]
        cells += [summary.percent(row.get("reached")), summary.size(row.get("bytes"))]
        return row["trial"], row["state"], row["error"], cells

    def show(self, console: Console) -> None:
        """Print the table, the failures, and where the files are."""
        title = summary.last_component(str(self._settings["model"]))
        heads, *rows = sweep_table.table(self.rows)
        # A terminal is narrow: calls lose their arguments where a name stays its own without.
        short = run_names.short(list(dict.fromkeys(row[0] for row in rows)))
        narrow = [heads, *([short[row[0]], *row[1:]] for row in rows)]
        show_wide(title, narrow, console, labels=len(sweep_table.LABELS))
        for name, error in self.errors.items():
            log = f"{self._output / 'failures' / name}.log"
            console.print(Text(f"failed: {name}: {error} ({log})", style="yellow"), soft_wrap=True)
        files = f"all trials: {self._output / 'sweep.csv'}, {self._output / 'sweep.html'}"
        console.print(Text(files), soft_wrap=True)
