"""Print tables, notes and progress on the terminal, from the primary process only."""

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

_LINES = 10  # most progress lines per stage in a log
_MARGIN = 3  # characters of a column beside its cells: a space on both sides and a rule


def closing_table(report: Mapping[str, Any]) -> Table:
    """Return a table of the run: quality and size, dense and pruned, then time and memory.

    Args:
      report: Content of pruning_report.json.
    """
    parts = [
        summary.last_component(str(report["model"])),
        report["method"],
        summary.protocol_note(report),
    ]
    title = ", ".join(part for part in parts if part)
    table = Table(title=Text(title), title_justify="left")
    for heading in ("", "dense", "pruned", "change"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    # Text, not str: rich reads [brackets] in a str as markup, and paths may hold them.
    for row in summary.quality_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    for label, value in summary.cost_rows(report):
        table.add_row(Text(label), "", Text(value), "")
    return table


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the closing table, the warnings and the output's location.

    Args:
      report: Content of pruning_report.json.
      console: Where to print.
    """
    console.print(closing_table(report))
    for warning in report.get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for note in report.get("notes", ()):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if output := report.get("settings", {}).get("output"):
        console.print(Text(f"pruned model: {output}"), soft_wrap=True)
        console.print(Text(f"report: {Path(output) / 'report.html'}"), soft_wrap=True)
        for line in _other_formats(report.get("other_formats", {}), Path(output)):
            console.print(Text(line), soft_wrap=True)


def _other_formats(formats: Mapping[str, Any], output: Path) -> Iterator[str]:
    """Yield where further formats of the model lie, and their sizes."""
    if gguf := formats.get("gguf"):
        size = summary.size(gguf["bytes"])
        yield f"for llama.cpp: {output / gguf['file']}, {size}, {gguf['load_back']}"
    if pack := formats.get("pack"):
        sizes = (summary.size(pack[name]) for name in ("packed", "dense"))
        yield f"without zeros: {output / pack['folder']}, {' of '.join(sizes)}"


def show_wide(title: str, rows: Sequence[Sequence[str]], console: Console, labels: int = 1) -> None:
    """Print a table, in several parts below each other if the console is too narrow.

    Args:
      title: Title above the first part.
      rows: Headings, then the cells of each row.
      console: Where to print.
      labels: Number of leading columns that name a row; every part repeats them.
    """
    widths = _column_widths(rows, console.width, labels)
    label_columns = list(range(labels))
    room = console.width - 1 - sum(widths[k] + _MARGIN for k in label_columns)
    parts: list[list[int]] = [[]]
    for k in range(labels, len(widths)):
        if parts[-1] and sum(widths[j] + _MARGIN for j in [*parts[-1], k]) > room:
            parts.append([])
        parts[-1].append(k)
    for n, part in enumerate(parts):
        columns = label_columns + part
        table = Table(title=None if n else Text(title), title_justify="left")
        for k in columns:
            side: JustifyMethod = "left" if k < labels else "right"
            table.add_column(Text(rows[0][k]), justify=side, overflow="fold", width=widths[k])
        for row in rows[1:]:
            table.add_row(*(Text(row[k]) for k in columns))
        console.print(table)


def _column_widths(rows: Sequence[Sequence[str]], width: int, labels: int) -> list[int]:
    """Return each column's width: its widest cell, the labels together at most half a line."""
    widths = []
    for column in zip(*rows, strict=True):
        heading, *cells = column
        # A heading wraps at its spaces; a cell stays on one line if it can.
        natural = max(cell_len(text) for text in (*heading.split(), *cells, "x"))
        widths.append(min(natural, width // 2 - 4))
    while sum(widths[:labels]) + labels * _MARGIN > width // 2 and max(widths[:labels]) > 1:
        widths[widths.index(max(widths[:labels]))] -= 1
    return widths


def note(text: str, console: Console | None = None) -> None:
    """Print one line from the primary process.

    Args:
      text: The line.
      console: Where to print; standard error by default.
    """
    if is_primary():
        (console or Console(stderr=True)).print(Text(text), soft_wrap=True)


# (description, number of steps) -> a function to call after each step.
Stage = Callable[[str, int], Callable[[], None]]


@contextlib.contextmanager
def progress(console: Console | None = None) -> Iterator[Stage]:
    """Show the progress of work in stages, from the primary process.

    A terminal gets one bar per stage with the time left. Anything else gets at most ten plain
    lines per stage, without control characters.

    Args:
      console: Where to print; standard error by default.

    Yields:
      `stage(description, steps)`, which returns a function to call after each step.
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
    """Return a progress display: description, bar, steps, time elapsed, time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    # Average the speed over the whole stage: within rich's default of 30 s a block of a large
    # model may not finish, and then no time left would be shown.
    return Progress(*columns, console=console, speed_estimate_period=float("inf"))


def _lines(total: int, description: str, console: Console) -> Callable[[], None]:
    """Return an `advance` that prints a progress line after about every tenth of the steps."""
    start, done = time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * _LINES // total > (done - 1) * _LINES // total:
            elapsed = time.monotonic() - start
            left = summary.duration(elapsed / done * (total - done))
            spent = summary.duration(elapsed)
            line = f"{description}: {done} of {total}, {spent} elapsed, {left} left"
            console.print(Text(line), soft_wrap=True)

    return advance
