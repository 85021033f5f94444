"""Print tables and notes on the terminal, from the primary process only."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from launch.report import recovered, summary, targets
from models.processes import is_primary

_MARGIN = 3  # characters of a column beside its cells: a space on both sides and a rule


def closing_table(report: Mapping[str, Any]) -> Table:
    """Return a table of the run: quality and size by model, then time and memory.

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
    headings = recovered.headings(report)
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    # Text, not str: rich reads [brackets] in a str as markup, and paths may hold them.
    for row in recovered.rows(report):
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    for label, value in summary.cost_rows(report):
        table.add_row(Text(label), *[""] * (len(headings) - 2), Text(value), "")
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


class BestEffortStream:
    """A text stream whose writes never fail: a closed pipe or terminal must not end a run.

    Args:
      stream: The stream to write to; None, as Python has it for a closed one, to drop everything.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, or drop it if nobody can read it.

        Args:
          text: The text.
        """
        if self._stream is not None:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # the latter from a stream that is closed
                self._drop()
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._drop()

    def _drop(self) -> None:
        """Drop everything from here on."""
        # What the stream has buffered would fail again when Python exits, and change its exit code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), cast(TextIO, self._stream).fileno())
        self._stream = None

    def isatty(self) -> bool:
        """Return True if the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()


def error_console() -> Console:
    """Return a console on standard error for what a run can do without.

    It is interactive only on a terminal that can be redrawn.
    """
    stream = BestEffortStream(sys.stderr)
    # FORCE_COLOR may ask for colours in a log, which still cannot be redrawn.
    interactive = None if stream.isatty() else False
    return Console(file=cast(IO[str], stream), force_interactive=interactive)


def note(text: str, console: Console | None = None) -> None:
    """Print one line from the primary process.

    Args:
      text: The line.
      console: Where to print; standard error by default.
    """
    if is_primary():
        (console or error_console()).print(Text(text), soft_wrap=True)


def show_search(record: Mapping[str, Any], place: Console | None = None) -> None:
    """Print the search for a target on standard error, and what it found.

    Args:
      record: The report's `target`.
      place: Where to print; standard error by default.
    """
    if not is_primary():
        return
    place = place or error_console()
    title = Text(f"target {record['target']}: {targets.quantity(record)}, {record['dtype']}")
    table = Table(title=title, title_justify="left")
    for heading in ("sparsity", "what stays", "predicted"):
        table.add_column(heading, justify="left" if heading == "what stays" else "right")
    for row in targets.search_rows(record):
        chosen = row[0] == f"{record['sparsity']:.6g}"
        table.add_row(*(Text(cell, style="bold" if chosen else "") for cell in row))
    place.print(table)
    show = targets.target_of(record).show_value
    found = f"chosen: sparsity {record['sparsity']:.6g}, predicted {show(record['predicted'])}"
    note(found, place)
