"""Make the table of `launch.compare`: one row per pruned model, as text, Markdown and LaTeX."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.report import summary

LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
MEAN = "mean of the tasks"  # mean of the first accuracy of each task
PARTS = {"prompt": "prompts", "generation": "generation"}  # measured speeds and their headings

Accuracy = tuple[float, float | None]  # value and standard error


class Run(NamedTuple):
    """A finished run of `launch.prune`.

    Attributes:
      name: Method, allocation and refinement.
      share: Fraction of the dense model's parameters that are left and not zero.
      report: Content of pruning_report.json.
      speedup: Speed relative to the dense model by part; empty if it was not measured.
    """

    name: str
    share: float
    report: Mapping[str, Any]
    speedup: Mapping[str, float]


def data_sets(runs: Sequence[Run]) -> list[str]:
    """List the data sets that any of the runs was evaluated on."""
    return list(dict.fromkeys(name for r in runs for name in r.report["perplexity"]))


class Columns(NamedTuple):
    """Optional columns of the table.

    Attributes:
      data: Data sets.
      metrics: (task, metric) of the accuracies.
      speed: True to show measured speed-ups.
      protocol: True to show the names of protocols.
    """

    data: Sequence[str]
    metrics: Sequence[tuple[str, str]]
    speed: bool
    protocol: bool

    @property
    def tasks(self) -> dict[str, str]:
        """Return the first metric of each task."""
        return dict(reversed(self.metrics))


def _columns(runs: Sequence[Run]) -> Columns:
    metrics = [
        (m.task, m.name)
        for r in runs
        for m in summary.metrics(r.report.get("tasks", {}))
        if m.fraction
    ]
    return Columns(
        data=data_sets(runs),
        metrics=list(dict.fromkeys(metrics)),
        speed=any(r.speedup for r in runs),
        protocol=any(summary.protocol_note(r.report) for r in runs),
    )


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the table as text: headings, the dense model, one row per run.

    Args:
      runs: The runs, in the order of the rows.
    """
    columns = _columns(runs)
    labels = summary.short_names(columns.data)
    heads = ["run", "removed", "parameters", "size"]
    heads += [f"perplexity, {summary.shorten(labels[name])}" for name in columns.data]
    heads += [f"{task}, {metric}" for task, metric in columns.metrics]
    if len(columns.tasks) > 1:
        heads.append(MEAN)
    if columns.speed:
        heads += PARTS.values()
    heads.append("pruned in")
    if columns.protocol:
        heads.append("protocol")
    return [heads, _dense_row(runs, columns), *(_run_row(r, columns) for r in runs)]


def _dense_row(runs: Sequence[Run], columns: Columns) -> list[str]:
    """Return the dense model's row, each number from the first run that has it."""
    report = runs[0].report
    cells = ["dense", "", summary.count(report["parameters"]["dense"])]
    cells.append(summary.size(report["bytes"]["dense"]))
    for name in columns.data:
        values = (r.report["perplexity"].get(name, {}).get("dense") for r in runs)
        cells.append(summary.perplexity(_first(values)))
    cells += _accuracy_cells(columns, lambda task, name: _accuracy(runs, "dense", task, name))
    if columns.speed:
        cells += ["1.00x"] * len(PARTS)
    cells.append("")
    if columns.protocol:
        cells.append("")
    return cells


def _run_row(r: Run, columns: Columns) -> list[str]:
    """Return a run's row."""
    report = r.report
    cells = [r.name, summary.percent(report["sparsity"]["total"])]
    cells.append(summary.count(report["parameters"]["pruned"]))
    cells.append(summary.size(report["bytes"]["pruned"]))
    for name in columns.data:
        cell = summary.perplexity(report["perplexity"].get(name, {}).get("pruned"))
        if spread := summary.draw_spread(report, name):
            cell += f" ({spread.mean} over {len(report['draws'])} draws)"
        cells.append(cell)
    cells += _accuracy_cells(columns, lambda task, name: _accuracy([r], "pruned", task, name))
    if columns.speed:
        cells += [f"{r.speedup[p]:.2f}x" if r.speedup else summary.ABSENT for p in PARTS]
    cells.append(summary.duration(report["seconds"]["calibrate_and_prune"]))
    if columns.protocol:
        note = summary.protocol_note(report).removeprefix("protocol ")
        cells.append(note or summary.ABSENT)
    return cells


def _accuracy_cells(columns: Columns, accuracy: Callable[[str, str], Accuracy | None]) -> list[str]:
    """Return the cells of every accuracy, and of the mean of several tasks.

    Args:
      columns: The table's columns.
      accuracy: (task, metric) -> accuracy, None if it was not measured.
    """
    cells = [summary.measured(accuracy(*metric), fraction=True) for metric in columns.metrics]
    if len(columns.tasks) > 1:
        first = [accuracy(task, metric) for task, metric in columns.tasks.items()]
        cells.append(summary.measured(_mean(first), fraction=True))
    return cells


def _first(values: Iterable[Any]) -> Any:
    """Return the first value that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


def _accuracy(runs: Sequence[Run], model: str, task: str, name: str) -> Accuracy | None:
    """Return the accuracy of the "dense" or "pruned" model in the first run that has it."""
    return _first(
        m.of(model)
        for r in runs
        for m in summary.metrics(r.report.get("tasks", {}))
        if (m.task, m.name) == (task, name)
    )


def _mean(values: Sequence[Accuracy | None]) -> Accuracy | None:
    """Return the mean of accuracies and its standard error; None if one was not measured.

    The errors are combined as independent, since the tasks have different documents.
    """
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    errors = [error for _, error in known if error is not None]
    error = math.hypot(*errors) / len(known) if len(errors) == len(known) else None
    return sum(value for value, _ in known) / len(known), error


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return the table in Markdown, numbers aligned to the right."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in table]
    rule = "|---|" + "---:|" * (len(table[0]) - 1)
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def latex(table: Sequence[Sequence[str]]) -> str:
    """Return the table as a LaTeX tabular with the rules of booktabs."""

    def escape(cell: str) -> str:
        return cell.translate(LATEX).replace("±", r"$\pm$").replace("…", r"\ldots{}")

    heads, *lines = (" & ".join(map(escape, row)) + r" \\" for row in table)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    end = r"\end{tabular}"
    return "\n".join([begin, r"\toprule", heads, r"\midrule", *lines, r"\bottomrule", end]) + "\n"
