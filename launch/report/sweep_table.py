"""Summarise the trials of a sweep over seeds: rows of a file, lines and columns of a table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.report import compare_plot, run_names, summary
from launch.report.measures import AGREEMENT, MEASURES
from launch.report.seeds import Spread, spread
from launch.report.sweep_plot import Point
from launch.trials.trial import Trial

# Prefixes of the file's columns of perplexity, before the name of a data set.
DENSE, PRUNED = "perplexity_dense:", "perplexity:"
# Prefixes of its columns of accuracy, before a task and a metric: piqa, acc.
DENSE_ACCURACY, ACCURACY = "accuracy_dense:", "accuracy:"
# Columns that name a line of the table.
LABELS = ("method", "target")


def pending_row(trial: Trial, state: str, error: str = "") -> dict[str, Any]:
    """Return the row of a trial without results.

    Args:
      trial: The trial.
      state: "waiting", "finished", "failed" or "left out".
      error: Reason for a failure or for leaving the trial out.
    """
    c = trial.config
    return {
        "trial": trial.name,
        "state": state,
        "method": c.method,
        "sparsity": c.sparsity,
        "target": c.target,
        "pattern": c.pattern,
        "allocation": c.allocation,
        "refine": c.refine,
        "seed": c.seed,
        "error": error,
    }


def finished_row(trial: Trial, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a finished trial.

    Args:
      trial: The trial.
      report: Content of its pruning_report.json.

    Returns:
      The settings; `sparsity` as requested; `reached`, the fraction removed of the prunable
      weights; `total`, of all weights; `stored`, the parameters that are stored as a fraction of
      the dense model's; size, seconds, perplexities, agreements with the dense model (and those of
      the dense model with itself where they are no constants) and accuracies.
    """
    row = pending_row(trial, "finished") | {
        "sparsity": report["sparsity"]["target"],
        "reached": report["sparsity"]["prunable"],
        "total": report["sparsity"]["total"],
        "parameters": report["parameters"]["pruned"],
        "stored": report["parameters"]["pruned"] / report["parameters"]["dense"],
        "bytes": report["bytes"]["pruned"],
        "seconds": sum(report["seconds"].values()),
    }
    for prefix, model in ((DENSE, "dense"), (PRUNED, "pruned")):
        row |= {f"{prefix}{name}": s[model] for name, s in report["perplexity"].items()}
    for m in AGREEMENT:
        for name in report["perplexity"]:
            if (value := m.of(report, name)) is not None:
                row[f"{m.key}:{name}"] = value
                if m.best is None:
                    row[f"{m.key}_dense:{name}"] = m.of_dense(report, name)
    metrics = [m for m in summary.metrics(report.get("tasks", {})) if m.fraction]
    for prefix, model in ((DENSE_ACCURACY, "dense"), (ACCURACY, "pruned")):
        for metric in metrics:
            if measured := metric.of(model):
                row[f"{prefix}{metric.task}, {metric.name}"] = measured[0]
    return row


class Line(NamedTuple):
    """Trials that differ only in the seed.

    Attributes:
      method: The method, as a call.
      allocation: The allocation, as a call.
      refine: The refinement, as a call.
      sparsity: Requested sparsity; None if the method or a target sets it.
      asked: Requested target; empty for none.
      pattern: Requested pattern.
      finished: Number of finished trials.
      trials: Number of trials.
      reached: Mean fraction removed of the prunable weights; None without a finished trial.
      total: The same of all weights.
      stored: Mean of the parameters stored, as a fraction of the dense model's; None likewise.
      bytes: Mean size in bytes; None without a finished trial.
      perplexity: Spread over seeds by data set.
      agreement: The same of each measure of agreement with the dense model, by its key.
      accuracy: Spread over seeds by task and metric.
    """

    method: str
    allocation: str
    refine: str
    sparsity: float | None
    asked: str
    pattern: str
    finished: int
    trials: int
    reached: float | None
    total: float | None
    stored: float | None
    bytes: float | None
    perplexity: Mapping[str, Spread]
    agreement: Mapping[str, Mapping[str, Spread]]
    accuracy: Mapping[str, Spread]

    @property
    def name(self) -> str:
        """Return the method with its allocation and refinement, if they are not the defaults."""
        return run_names.join(self.method, "", self.allocation, self.refine)

    @property
    def target(self) -> str:
        """Return the requested sparsity, target or pattern as text."""
        return run_names.amount(self.pattern, self.sparsity, self.asked)


def _spreads(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Spread]:
    """Return the spread over the rows of every column with the prefix."""
    # A collapsed model has an infinite perplexity, whose standard deviation is NaN.
    with np.errstate(invalid="ignore"):
        return {
            name: spread([row[f"{prefix}{name}"] for row in rows if f"{prefix}{name}" in row])
            for name in with_prefix(rows, prefix)
        }


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Combine rows that differ only in the seed; trials that were left out are dropped."""
    groups: dict[tuple[str, str, str, float | None, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] != "left out":
            settings = (row["method"], row["allocation"], row["refine"])
            # A target's sparsity may differ from seed to seed: times are measured.
            sparsity = None if row["target"] else row["sparsity"]
            key = (*settings, sparsity, row["target"], row["pattern"])
            groups.setdefault(key, []).append(row)
    result = []
    for key, members in groups.items():
        done = [row for row in members if row["state"] == "finished"]
        line = Line(
            *key,
            finished=len(done),
            trials=len(members),
            reached=_mean(done, "reached"),
            total=_mean(done, "total"),
            stored=_mean(done, "stored"),
            bytes=_mean(done, "bytes"),
            perplexity=_spreads(done, PRUNED),
            agreement={m.key: _spreads(done, f"{m.key}:") for m in AGREEMENT},
            accuracy=_spreads(done, ACCURACY),
        )
        result.append(line)
    return result


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Return the mean of a column, None without rows."""
    return float(np.mean([row[column] for row in rows])) if rows else None


def with_prefix(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Return {name: last value} of all columns `prefix` + name."""
    return {k.removeprefix(prefix): v for r in rows for k, v in r.items() if k.startswith(prefix)}


class Column(NamedTuple):
    """One of the table's columns of quality.

    Attributes:
      kind: "perplexity", the key of a measure of agreement, or "accuracy".
      name: Data set, or task and metric.
      label: Short name for the heading.
      dense: Value of the dense model.
    """

    kind: str
    name: str
    label: str
    dense: float

    @property
    def heading(self) -> str:
        """Return the heading of the column."""
        measure = MEASURES.get(self.kind)
        return f"{measure.heading}, {self.label}" if measure else self.label

    def text(self, value: float | None) -> str:
        """Format a value of this column."""
        if self.kind == "perplexity":
            return summary.perplexity(value)
        measure = MEASURES.get(self.kind)
        return measure.text(value) if measure else summary.percent(value)

    def spread(self, line: Line) -> Spread | None:
        """Return the values of a line; None if it has none."""
        agreement = line.agreement.get(self.kind, {})
        by_kind = {"perplexity": line.perplexity, "accuracy": line.accuracy}
        return by_kind.get(self.kind, agreement).get(self.name)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns for which a row has values: those of data sets, then accuracies."""
    dense, result = with_prefix(rows, DENSE), []
    labels = summary.short_names(dense)
    for name, value in dense.items():
        result.append(Column("perplexity", name, labels[name], value))
        for m in AGREEMENT:
            if name in with_prefix(rows, f"{m.key}:"):
                best = with_prefix(rows, f"{m.key}_dense:")[name] if m.best is None else m.best
                result.append(Column(m.key, name, labels[name], best))
    for name, value in with_prefix(rows, DENSE_ACCURACY).items():
        result.append(Column("accuracy", name, name, value))
    return result


def spread_text(s: Spread | None, seeds: int, text: Callable[[float], str]) -> str:
    """Format a mean, with its standard deviation if there are several seeds.

    Args:
      s: The spread; None if nothing is finished.
      seeds: Number of finished trials.
      text: Formats a value.
    """
    if s is None:
        return summary.ABSENT
    return text(s.mean) + (f" ± {text(s.std)}" if seeds > 1 else "")


def _cells(line: Line, quality: Sequence[Column]) -> list[str]:
    """Return a line of the table as text."""
    cells = [line.name, line.target or summary.ABSENT]
    for c in quality:
        cells.append(spread_text(c.spread(line), line.finished, c.text))
    seeds = str(line.finished)
    if line.finished < line.trials:
        seeds += f" of {line.trials}"
    size = summary.ABSENT if line.bytes is None else summary.size(round(line.bytes))
    return [*cells, summary.percent(line.reached), seeds, size]


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table as text: headings, a line per setting, the dense model last."""
    quality, costs = columns(rows), ("reached", "seeds", "size")
    result = [[*LABELS, *(c.heading for c in quality), *costs]]
    result += [_cells(line, quality) for line in lines(rows)]
    if quality:
        values = [c.text(c.dense) for c in quality]
        result.append(["dense", *[""] * (len(LABELS) - 1), *values, *[""] * len(costs)])
    return result


def curves(every: Sequence[Line], data: str) -> dict[str, list[Point]]:
    """Return a data set's points by method, allocation and refinement, in order of sparsity.

    Args:
      every: The lines of the table.
      data: Name of the data set.
    """
    result: dict[str, list[Point]] = {}
    for line in every:
        if data in line.perplexity and line.reached is not None:
            point = Point(line.reached, *line.perplexity[data])
            result.setdefault(line.name, []).append(point)
    return {name: sorted(points) for name, points in result.items()}


def front_points(every: Sequence[Line], column: Column) -> list[compare_plot.Point]:
    """Return the dense model and every line as points of perplexity against the weights left.

    Args:
      every: The lines of the table.
      column: A column of perplexities.
    """
    result = [compare_plot.Point("dense", 1.0, column.dense, compare_plot.DENSE)]
    for line in every:
        if column.name in line.perplexity and line.total is not None and line.stored is not None:
            name = run_names.join(line.method, line.target, line.allocation, line.refine)
            kind = compare_plot.kind_of(line.stored, line.total)
            mean = line.perplexity[column.name].mean
            result.append(compare_plot.Point(name, 1 - line.total, mean, kind))
    return result
