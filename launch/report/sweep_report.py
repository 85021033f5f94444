"""What a sweep leaves: sweep.json and sweep.csv with a row a trial, sweep.html with plots, and the table in the terminal."""

import csv
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from calibration.journal import write_durably
from launch.report import html as report
from launch.report import summary, sweep_plot
from launch.report.console import show_wide
from launch.report.seeds import Spread, spread
from launch.report.sweep_plot import Point
from launch.trials.trial import Trial

INDEX = "sweep.json"
DENSE, PRUNED = (
    "perplexity_dense:",
    "perplexity:",
)  # before the name of a data set: a column of the file
DENSE_ACCURACY, ACCURACY = "accuracy_dense:", "accuracy:"  # before a task and a metric: piqa, acc
FIGURES = (
    "reached",
    "total",
    "parameters",
    "bytes",
    "seconds",
)  # of a finished trial, beside its quality
LABELS = ("method", "allocation", "refine")


def describe(trial: Trial, state: str, error: str = "") -> dict[str, Any]:
    """A trial's row without figures; `state` is "waiting", "finished", "failed" or "left out"."""
    c = trial.config
    own = {
        "method": c.method,
        "sparsity": c.sparsity,
        "allocation": c.allocation,
        "refine": c.refine,
        "seed": c.seed,
    }
    return {"trial": trial.name, "state": state, **own, "error": error}


def measured(trial: Trial, found: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a finished trial from its report: `sparsity` as asked, `reached` of the prunable weights, `total` of all."""
    figures = {
        "sparsity": found["sparsity"]["target"],
        "reached": found["sparsity"]["prunable"],
        "total": found["sparsity"]["total"],
        "parameters": found["parameters"]["pruned"],
        "bytes": found["bytes"]["pruned"],
        "seconds": sum(found["seconds"].values()),
    }
    dense = {f"{DENSE}{name}": scores["dense"] for name, scores in found["perplexity"].items()}
    pruned = {f"{PRUNED}{name}": scores["pruned"] for name, scores in found["perplexity"].items()}
    accuracies = [
        (f"{m.task}, {m.name}", m) for m in summary.metrics(found.get("tasks", {})) if m.fraction
    ]
    before = {f"{DENSE_ACCURACY}{name}": m.dense[0] for name, m in accuracies if m.dense}
    after = {f"{ACCURACY}{name}": m.pruned[0] for name, m in accuracies if m.pruned}
    return describe(trial, "finished") | figures | dense | pruned | before | after


class Line(NamedTuple):
    """Trials that differ in nothing but the seed: how many are finished, of how many, and their figures over seeds.

    `perplexity` is by data set, `accuracy` by task and metric; figures are None where no trial is finished.
    """

    method: str
    allocation: str
    refine: str
    sparsity: float | None
    finished: int
    trials: int
    reached: float | None
    bytes: float | None
    perplexity: Mapping[str, Spread]
    accuracy: Mapping[str, Spread]

    @property
    def name(self) -> str:
        """Of the curve that it is a point of."""
        return ", ".join(
            [
                self.method,
                *(own for own in (self.allocation, self.refine) if own not in ("uniform", "none")),
            ]
        )


def _spread(values: Sequence[float]) -> Spread:
    with np.errstate(
        invalid="ignore"
    ):  # a collapsed model has an infinite perplexity, and no spread
        return spread(values)


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The rows, without those left out, put together over seeds in their order."""
    found: dict[tuple[str, str, str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] != "left out":
            found.setdefault(
                (row["method"], row["allocation"], row["refine"], row["sparsity"]), []
            ).append(row)
    made = []
    for key, members in found.items():
        done = [row for row in members if row["state"] == "finished"]
        reached, size = (
            float(np.mean([row[name] for row in done])) if done else None
            for name in ("reached", "bytes")
        )
        every = [
            {name: _spread([row[f"{kind}{name}"] for row in done]) for name in named(done, kind)}
            for kind in (PRUNED, ACCURACY)
        ]
        made.append(Line(*key, len(done), len(members), reached, size, *every))
    return made


def named(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """{name: figure} of the columns whose names begin with `kind`, over all rows; with DENSE the dense model's perplexities by data set."""
    return {k.removeprefix(kind): v for row in rows for k, v in row.items() if k.startswith(kind)}


def cell(s: Spread | None, seeds: int, say: Callable[[float], str]) -> str:
    """A figure with its standard deviation over seeds, if there are some."""
    if s is None:
        return summary.ABSENT
    return say(s.mean) + (f" ± {say(s.std)}" if seeds > 1 else "")


class Column(NamedTuple):
    """One of the table's columns of quality. `kind`: as `Line` calls it; `name`: of the data set, or task and metric; `dense`: the dense
    model's figure."""

    kind: Literal["perplexity", "accuracy"]
    name: str
    dense: float

    @property
    def heading(self) -> str:
        """Over the column."""
        return (
            f"perplexity, {summary.shorten(self.name)}" if self.kind == "perplexity" else self.name
        )

    def say(self, value: float | None) -> str:
        """A figure of this column."""
        return summary.perplexity(value) if self.kind == "perplexity" else summary.percent(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those that any of the rows has figures for: perplexities, then accuracies."""
    perplexities = [Column("perplexity", name, value) for name, value in named(rows, DENSE).items()]
    return perplexities + [
        Column("accuracy", name, value) for name, value in named(rows, DENSE_ACCURACY).items()
    ]


def cells(line: Line, quality: Sequence[Column]) -> list[str]:
    """A line of the table: method, allocation, refinement, asked, reached, seeds, size, and its figures of quality."""
    seeds = (
        str(line.finished) if line.finished == line.trials else f"{line.finished} of {line.trials}"
    )
    size = summary.ABSENT if line.bytes is None else summary.size(round(line.bytes))
    head = [
        line.method,
        line.allocation,
        line.refine,
        summary.percent(line.sparsity),
        summary.percent(line.reached),
        seeds,
        size,
    ]
    return head + [cell(getattr(line, c.kind).get(c.name), line.finished, c.say) for c in quality]


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Headings, then mean and standard deviation over seeds for each method, allocation, refinement and sparsity; the dense model last."""
    quality, head = columns(rows), [*LABELS, "asked", "got", "seeds", "size"]
    made = [[*head, *(c.heading for c in quality)], *(cells(line, quality) for line in lines(rows))]
    if quality:
        made.append(["dense", *[""] * (len(head) - 1), *(c.say(c.dense) for c in quality)])
    return made


class Board:
    """What became of the trials of a sweep, and its files in the sweep's directory."""

    def __init__(
        self,
        output: pathlib.Path,
        settings: Mapping[str, Any],
        possible: Sequence[Trial],
        impossible: Sequence[tuple[Trial, str]],
    ):
        self._output, self._settings = output, dict(settings)
        self._rows = {t.name: describe(t, "waiting") for t in possible}
        self._rows |= {t.name: describe(t, "left out", why) for t, why in impossible}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a trial, as `describe` and `measured` make them."""
        return list(self._rows.values())

    @property
    def errors(self) -> dict[str, str]:
        """Why trials failed, by name."""
        return {row["trial"]: row["error"] for row in self.rows if row["state"] == "failed"}

    def look(self, trial: Trial, error: str | None = None) -> bool:
        """Whether a trial is finished, its figures taken from its report; if not, the `error` says why it failed."""
        if error is None and (found := trial.report()):
            self._rows[trial.name] = measured(trial, found)
            return True
        self._rows[trial.name] = describe(trial, "failed" if error else "waiting", error or "")
        return False

    def said(self, trial: Trial) -> str:
        """How far the sweep is, and what became of this trial, in a line."""
        row, rows = self._rows[trial.name], [r for r in self.rows if r["state"] != "left out"]
        done = sum(r["state"] != "waiting" for r in rows)
        figures = [
            f"perplexity {summary.perplexity(v)} ({k.removeprefix(PRUNED)})"
            for k, v in row.items()
            if k.startswith(PRUNED)
        ]
        return f"{done} of {len(rows)}: {trial.name}: {', '.join(figures) or 'failed: ' + row['error']}"

    def save(self) -> None:
        """Write sweep.json and sweep.csv, each in one stroke."""
        self._output.mkdir(exist_ok=True)
        content = {"settings": self._settings, "trials": self.rows}
        write_durably(
            self._output / INDEX,
            (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(),
        )
        names = dict.fromkeys(
            ["trial", "state", "method", "allocation", "refine", "sparsity", "seed", *FIGURES]
        )
        columns = dict.fromkeys(
            [*names, *(column for row in self.rows for column in row if column != "error"), "error"]
        )
        file = io.StringIO()
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_durably(self._output / "sweep.csv", file.getvalue().encode())

    def publish(self) -> None:
        """Write what `save` does, and sweep.html."""
        self.save()
        write_durably(self._output / "sweep.html", self._html().encode())

    def _html(self) -> str:
        quality, found = columns(self.rows), lines(self.rows)
        figures = [
            report.Figure(
                f"Perplexity, {c.name}",
                "Mean over seeds against the share of the prunable weights that went; bars: one standard deviation. "
                f"Dashed: the dense model, {c.say(c.dense)}. Lower is better.",
                sweep_plot.perplexity_by_sparsity(curves(found, c.name), c.dense),
            )
            for c in quality
            if c.kind == "perplexity"
        ]
        return report.template("sweep.html.j2").render(
            settings=self._settings,
            figures=[figure for figure in figures if figure.svg],
            table=table(self.rows),
            trials=[self._row(row, quality) for row in self.rows],
            finished=sum(line.finished for line in found),
            planned=sum(line.trials for line in found),
            quality=[c.heading for c in quality],
        )

    @staticmethod
    def _row(row: Mapping[str, Any], quality: Sequence[Column]) -> tuple[str, str, str, list[str]]:
        """A trial's name, its state, why it has no figures, and what it reached, its size and its figures of quality."""
        figures = [summary.percent(row.get("reached")), summary.size(row.get("bytes"))]
        figures += [c.say(row.get(f"{c.kind}:{c.name}")) for c in quality]
        return row["trial"], row["state"], row["error"], figures

    def show(self, console: Console) -> None:
        """Print the table, what failed, and where the rest stands."""
        show_wide(str(self._settings["model"]), table(self.rows), console, labels=len(LABELS))
        for name, error in self.errors.items():
            console.print(
                Text(
                    f"failed: {name}: {error} ({self._output / 'failures' / name}.log)",
                    style="yellow",
                ),
                soft_wrap=True,
            )
        console.print(
            Text(f"all trials: {self._output / 'sweep.csv'}, {self._output / 'sweep.html'}"),
            soft_wrap=True,
        )


def curves(found: Sequence[Line], name: str) -> dict[str, list[Point]]:
    """Of a data set, each method's points, with each allocation and refinement, by sparsity."""
    made: dict[str, list[Point]] = {}
    for line in found:
        if name in line.perplexity and line.reached is not None:
            made.setdefault(line.name, []).append(Point(line.reached, *line.perplexity[name]))
    return {label: sorted(points) for label, points in made.items()}
