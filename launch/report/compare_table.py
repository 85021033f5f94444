"""Make the table of `launch.compare`: one row per pruned model, as text, Markdown and LaTeX."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.report import summary
from launch.report.measures import AGREEMENT, PERPLEXITY, Measure
from launch.report.removal import TOLERANCE

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
      name: Method, sparsity or pattern, allocation and refinement.
      report: Content of pruning_report.json.
      speedup: Speed relative to the dense model by part; empty if it was not measured.
    """

    name: str
    report: Mapping[str, Any]
    speedup: Mapping[str, float]

    @property
    def stored(self) -> float:
        """Return the parameters that are stored, as a fraction of the dense model's."""
        parameters = self.report["parameters"]
        return parameters["pruned"] / parameters["dense"]

    @property
    def total(self) -> float:
        """Return the weights that are gone or zero, as a fraction of the dense model's."""
        return self.report["sparsity"]["total"]


def data_sets(runs: Sequence[Run]) -> list[str]:
    """List the data sets that any of the runs was evaluated on."""
    return list(dict.fromkeys(name for r in runs for name in r.report["perplexity"]))


class Marks(NamedTuple):
    """Marks of numbers that cannot be compared with those of most runs.

    Attributes:
      model: Mark by index of a run that began from another dense model.
      data: Mark by index of a run and data set, where its evaluation tokens are others.
      notes: What each mark means, with the runs that have it.
    """

    model: Mapping[int, str]
    data: Mapping[tuple[int, str], str]
    notes: Sequence[str]


def marks_of(runs: Sequence[Run]) -> Marks:
    """Mark the runs whose dense model or evaluation tokens differ from those of most runs.

    Args:
      runs: The runs.
    """
    notes: list[str] = []

    def mark(kinds: Mapping[int, Any], difference: Callable[[int, int], str]) -> dict[int, str]:
        """Mark the runs whose kind is not the most frequent, one letter for each other kind."""
        if not kinds:
            return {}
        usual = Counter(kinds.values()).most_common(1)[0][0]
        reference = next(k for k, kind in kinds.items() if kind == usual)
        marked: dict[int, str] = {}
        for other in dict.fromkeys(kinds.values()):
            if other == usual:
                continue
            members = [k for k, kind in kinds.items() if kind == other]
            letter = f" [{chr(ord('a') + len(notes) % 26)}]"
            names = "; ".join(runs[k].name for k in members)
            notes.append(f"{letter.strip()} {names}: {difference(members[0], reference)}")
            marked |= dict.fromkeys(members, letter)
        return marked

    def count(k: int) -> str:
        return f"{runs[k].report['parameters']['dense']:,}"

    dense = {k: r.report["parameters"]["dense"] for k, r in enumerate(runs)}
    model = mark(dense, lambda k, j: f"another dense model, {count(k)} parameters, not {count(j)}")
    data: dict[tuple[int, str], str] = {}
    for name, label in summary.short_names(data_sets(runs)).items():
        tokens = {k: _tokens(r, name) for k, r in enumerate(runs) if name in r.report["perplexity"]}
        digests = {k: facts.get("sha256") for k, facts in tokens.items()}

        def difference(k: int, j: int, tokens: Any = tokens, label: str = label) -> str:
            return f"other tokens of {label}, {_windows(tokens[k])}, not {_windows(tokens[j])}"

        data |= {(k, name): letter for k, letter in mark(digests, difference).items()}
    return Marks(model, data, notes)


def _tokens(r: Run, name: str) -> Mapping[str, Any]:
    """Return the protocol of a data set's evaluation."""
    return r.report.get("protocol", {}).get("evaluation", {}).get(name, {})


def _windows(tokens: Mapping[str, Any]) -> str:
    """Return `8 windows of 64 (1f2e3d)`, the digest's first digits in parentheses."""
    digest = str(tokens.get("sha256", "unknown"))[:6]
    return f"{tokens.get('samples', '?')} windows of {tokens.get('length', '?')} ({digest})"


class Columns(NamedTuple):
    """Optional columns of the table.

    Attributes:
      data: Data sets.
      agreement: By data set, the measures of agreement with the dense model.
      metrics: (task, metric) of the accuracies.
      speed: True to show measured speed-ups.
      protocol: True to show the names of protocols.
    """

    data: Sequence[str]
    agreement: Mapping[str, Sequence[Measure]]
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
    data = data_sets(runs)
    return Columns(
        data=data,
        agreement={
            name: [m for m in AGREEMENT if any(m.of(r.report, name) is not None for r in runs)]
            for name in data
        },
        metrics=list(dict.fromkeys(metrics)),
        speed=any(r.speedup for r in runs),
        protocol=any(summary.protocol_note(r.report) for r in runs),
    )


def removed(r: Run) -> str:
    """Return what a run removed: `20%` that is no longer stored, `39.47% zeros` that are.

    A part of less than half a point is left out: stray zeros, or biases that were added.
    """
    taken_out = 1 - r.stored
    parts = {"": taken_out, " zeros": r.total - taken_out}
    texts = [summary.percent(x) + kind for kind, x in parts.items() if x >= TOLERANCE]
    return ", ".join(texts) or summary.percent(0.0)


def rows(runs: Sequence[Run], marks: Marks) -> list[list[str]]:
    """Return the table as text: headings, the dense model, one row per run.

    Args:
      runs: The runs, in the order of the rows.
      marks: Marks of numbers that cannot be compared with the others.
    """
    columns = _columns(runs)
    labels = summary.short_names(columns.data)
    heads = ["run", "removed", "parameters", "size"]
    for name in columns.data:
        label = summary.shorten(labels[name])
        heads += [f"{m.heading}, {label}" for m in (PERPLEXITY, *columns.agreement[name])]
    heads += [f"{task}, {metric}" for task, metric in columns.metrics]
    if len(columns.tasks) > 1:
        heads.append(MEAN)
    if columns.speed:
        heads += PARTS.values()
    heads.append("pruned in")
    if columns.protocol:
        heads.append("protocol")
    lines = (_run_row(k, r, columns, marks) for k, r in enumerate(runs))
    return [heads, _dense_row(runs, columns, marks), *lines]


def _dense_row(runs: Sequence[Run], columns: Columns, marks: Marks) -> list[str]:
    """Return the dense model's row, each number from the first run that has it unmarked."""
    usual_model = (r for k, r in enumerate(runs) if k not in marks.model)
    report = next(usual_model).report
    cells = ["dense", "", summary.count(report["parameters"]["dense"])]
    cells.append(summary.size(report["bytes"]["dense"]))
    for name in columns.data:
        usual = (r for k, r in enumerate(runs) if (k, name) not in marks.data)
        reports = [r.report for r in usual]
        dense = _first(PERPLEXITY.of_dense(report, name) for report in reports)
        cells.append(summary.perplexity(dense))
        for m in columns.agreement[name]:
            cells.append(m.text(_first(m.of_dense(report, name) for report in reports)))
    cells += _accuracy_cells(columns, lambda task, name: _accuracy(runs, "dense", task, name))
    if columns.speed:
        cells += ["1.00x"] * len(PARTS)
    cells.append("")
    if columns.protocol:
        cells.append("")
    return cells


def _run_row(k: int, r: Run, columns: Columns, marks: Marks) -> list[str]:
    """Return the row of run k."""
    report = r.report
    cells = [r.name + marks.model.get(k, ""), removed(r)]
    cells.append(summary.count(report["parameters"]["pruned"]))
    cells.append(summary.size(report["bytes"]["pruned"]))
    for name in columns.data:
        cell = summary.perplexity(PERPLEXITY.of(report, name))
        if spread := summary.draw_spread(report, name):
            cell += f" ({spread.mean} over {len(report['draws'])} draws)"
        mark = marks.data.get((k, name), "")
        texts = [cell, *(m.text(m.of(report, name)) for m in columns.agreement[name])]
        cells += [text + mark for text in texts]
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


def markdown(table: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return the table in Markdown, numbers aligned to the right, and the notes below it."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in table]
    rule = "|---|" + "---:|" * (len(table[0]) - 1)
    below = [line for note in notes for line in ("", note)]
    return "\n".join([lines[0], rule, *lines[1:], *below]) + "\n"


def latex(table: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return the table as a LaTeX tabular with the rules of booktabs, and the notes below it."""

    def escape(cell: str) -> str:
        return cell.translate(LATEX).replace("±", r"$\pm$").replace("…", r"\ldots{}")

    heads, *lines = (" & ".join(map(escape, row)) + r" \\" for row in table)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    below = [rf"\par\footnotesize {escape(note)}" for note in notes]
    end = [r"\bottomrule", r"\end{tabular}", *below]
    return "\n".join([begin, r"\toprule", heads, r"\midrule", *lines, *end]) + "\n"
