"""What the terminal shows: the closing table of a run, and a progress bar with the time left, from the main process only."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from launch.report import summary
from models.processes import is_primary

_LINES = 10  # most progress lines that a log gets


def closing_table(report: Mapping[str, Any]) -> Table:
    """The run in one table: perplexity, sparsity, parameters and bytes, dense → pruned, then seconds and peak memory."""
    title = ", ".join(
        filter(None, [str(report["model"]), report["method"], summary.followed(report)])
    )
    table = Table(title=Text(title), title_justify="left")
    for heading in ("", "dense", "pruned", "change"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    # Text, not str: a path with [brackets] is not markup.
    for row in summary.quality_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    for label, value in summary.cost_rows(report):
        table.add_row(Text(label), "", Text(value), "")
    return table


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the closing table, the warnings and where the pruned model lies (`settings["output"]`) on `console`."""
    console.print(closing_table(report))
    for warning in report.get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    if output := report.get("settings", {}).get("output"):
        console.print(Text(f"pruned model: {output}"), soft_wrap=True)
        console.print(Text(f"report: {Path(output) / 'report.html'}"), soft_wrap=True)


def show_wide(title: str, rows: Sequence[Sequence[str]], console: Console, labels: int = 1) -> None:
    """Print a table whose first row are headings, as several below each other where `console` is too narrow for all its columns.

    Args:
      labels: columns that name a row: each part begins with them.
    """

    widths = []  # headings break at spaces, figures and names if they take half the line
    for k, column in enumerate(zip(*rows, strict=True)):
        natural = max(cell_len(text) for text in (*column[0].split(), *column[1:], "x"))
        widths.append(min(natural, console.width // (2 * labels if k < labels else 2) - 4))
    own, beside = list(range(labels)), 3  # margins and a line
    room = console.width - 1 - sum(widths[k] + beside for k in own)
    parts: list[list[int]] = [[]]
    for k in range(labels, len(widths)):
        if parts[-1] and sum(widths[j] + beside for j in [*parts[-1], k]) > room:
            parts.append([])
        parts[-1].append(k)
    for n, part in enumerate(parts):
        table = Table(title=None if n else Text(title), title_justify="left")
        for k in own + part:
            side: JustifyMethod = "left" if k < labels else "right"
            table.add_column(Text(rows[0][k]), justify=side, overflow="fold", width=widths[k])
        for row in rows[1:]:
            table.add_row(*(Text(row[k]) for k in own + part))
        console.print(table)


def note(text: str, console: Console | None = None) -> None:
    """A line for who watches, on `console` (default: standard error), from the main process only."""
    if is_primary():
        (console or Console(stderr=True)).print(Text(text), soft_wrap=True)


Stage = Callable[[str, int], Callable[[], None]]


@contextlib.contextmanager
def progress(console: Console | None = None) -> Iterator[Stage]:
    """Show how far the stages of some work have come, on `console` (default: standard error).

    Yields `stage(description, steps)`, which gives what to call after each step. A terminal gets a bar a stage with the time left;
    anything else gets at most ten plain lines a stage, without control characters. Only the main process shows anything.
    """
    console = console or Console(stderr=True)
    if not is_primary():
        yield lambda description, steps: lambda: None
    elif console.is_interactive:
        with _bar(console) as bar:

            def stage(description: str, steps: int) -> Callable[[], None]:
                task = bar.add_task(description, total=steps)
                return lambda: bar.advance(task)

            yield stage
    else:
        yield lambda description, steps: _lines(steps, description, console)


def _bar(console: Console) -> Progress:
    text, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn(compact=True)
    columns = (
        text,
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        left,
    )
    # The speed is the whole run's: rich's own period of 30 s forgets a block that takes minutes, and shows no time left.
    return Progress(*columns, console=console, speed_estimate_period=float("inf"))


def _lines(total: int, description: str, console: Console) -> Callable[[], None]:
    """An `advance` that prints `description: done of total, time spent, time left` about every tenth of the way."""
    start, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * _LINES // total > (done - 1) * _LINES // total:
            spent = time.monotonic() - start
            left = summary.duration(spent / done * (total - done))
            line = f"{description}: {done} of {total}, {summary.duration(spent)} spent, {left} left"
            console.print(Text(line), soft_wrap=True)

    return advance
