"""List the plots and tables of the report, those of every run and those of the method."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch.report import block_plots, figure_plots, quality_plots, summary
from pruning.figures import Figure, KeptMap, LineSeries, Table, from_json


class Plot(NamedTuple):
    """A plot on the page.

    Attributes:
      heading: Title.
      caption: How to read it.
      svg: The plot as SVG text.
    """

    heading: str
    caption: str
    svg: str


class Section(NamedTuple):
    """A table on the page.

    Attributes:
      heading: Title.
      caption: How to read it.
      columns: Headings of the columns.
      rows: Cells of each row, as text.
    """

    heading: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def of_method(report: Mapping[str, Any]) -> list[Figure]:
    """Return the figures that the method added, without maps of units that all stayed."""
    every = [from_json(fields) for fields in report.get("figures") or ()]
    return [f for f in every if not isinstance(f, KeptMap) or _lost_units(f)]


def _lost_units(figure: KeptMap) -> bool:
    """Return True if a unit was removed; a cell that is None never was one."""
    return any(share is not None and share < 1 for row in figure.kept for share in row)


def tables(report: Mapping[str, Any]) -> list[Section]:
    """Return the method's tables."""
    return [
        Section(t.title, t.caption, t.columns, figure_plots.table_cells(t))
        for t in of_method(report)
        if isinstance(t, Table)
    ]


def plots(report: Mapping[str, Any]) -> list[Plot]:
    """Return all plots of the report; those with nothing to draw are left out."""
    every = [
        _perplexity(report),
        _accuracy(report),
        *(_of_method(figure) for figure in of_method(report) if not isinstance(figure, Table)),
        _sparsity(report["sparsity"]),
        _scores(report.get("scores") or {}),
    ]
    return [plot for plot in every if plot.svg]


def _of_method(figure: LineSeries | KeptMap) -> Plot:
    if isinstance(figure, LineSeries):
        svg = figure_plots.line_series(figure)
    else:
        svg = figure_plots.kept_map(figure)
    return Plot(figure.title, figure.caption, svg)


def sentence(text: str) -> str:
    """Return a clause as a sentence with a space before it, or nothing."""
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _perplexity(report: Mapping[str, Any]) -> Plot:
    perplexity = report.get("perplexity", {})
    labels = summary.short_names(perplexity)
    counts = [f"{labels[n]}: {s['tokens']:,}" for n, s in perplexity.items() if s.get("tokens")]
    caption = "Lower is better."
    if any(s.get("dense_stderr") or s.get("pruned_stderr") for s in perplexity.values()):
        caption += " Thin lines: one standard error over windows to each side."
    if counts:
        caption += f" Tokens predicted: {'; '.join(counts)}."
    caption += sentence(summary.protocol_note(report))
    return Plot("Perplexity before and after", caption, quality_plots.perplexity_bars(perplexity))


def _accuracy(report: Mapping[str, Any]) -> Plot:
    tasks = report.get("protocol", {}).get("tasks", {})
    counts = [f"{name}: {facts['documents']:,}" for name, facts in tasks.items()]
    caption = "Higher is better. Thin lines: one standard error to each side."
    if counts:
        caption += f" Documents: {'; '.join(counts)}."
    caption += sentence(summary.protocol_note(report))
    svg = quality_plots.accuracy_bars(report.get("tasks") or {})
    return Plot("Accuracy before and after", caption, svg)


def _sparsity(sparsity: Mapping[str, Any]) -> Plot:
    caption = (
        "Bars: sparsity reached. Line across: target, where the method has a budget. Linears "
        "within half a point of each other in every block share a panel. Blue: attention; "
        "orange: feed-forward; green: both."
    )
    svg = block_plots.sparsity_by_block(sparsity.get("per_linear", {}), sparsity.get("asked", {}))
    return Plot("Sparsity of each block", caption, svg)


def _scores(scores: Mapping[str, Any]) -> Plot:
    label = scores.get("label", "scores")
    caption = (
        "Box: the middle half of the scores, with a line at the median. "
        "Thin line: smallest to largest."
    )
    svg = block_plots.scores_by_block(scores.get("per_linear", {}), label)
    return Plot(f"Scores of each block: {label}", caption, svg)
