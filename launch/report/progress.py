"""Show how far a run is: one line on a terminal, a few plain lines in a log."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.report import summary
from launch.report.console import error_console
from models.processes import is_primary
from models.progress import Advance, Progress, no_advance, no_progress

BYTES = "bytes"  # the unit of steps that are shown as a size

PARTS = 10  # a log has a line after each of so many parts of a stage,
LEAST_SECONDS = 2.0  # unless the stage's last line is younger than this,
MOST_SECONDS = 300.0  # or as soon as its last line is older than this

REFRESHES = 4  # of the line on a terminal in a second
LEAST_BAR, GREATEST_BAR = 8, 30  # cells
DESCRIPTION_CELLS = 28  # of a description that figures leave room for


@dataclasses.dataclass
class Stage:
    """A stage of the work, and how far it is.

    Attributes:
      description: The work.
      total: Steps of the whole stage.
      unit: What a step is; empty if it says nothing to a reader.
      tokens: Tokens that the whole stage reads; 0 for none.
      resumed: Steps that an earlier run has done.
    """

    description: str
    total: int
    unit: str = ""
    tokens: int = 0
    resumed: int = 0

    def __post_init__(self) -> None:
        self.description = " ".join(self.description.split())  # a file's name may hold a newline
        self.done, self.note = self.resumed, ""
        self.began = self.stepped = time.monotonic()

    def step(self, steps: int, note: str = "") -> None:
        """Count steps that have been done.

        Args:
          steps: How many.
          note: How the work goes; empty for nothing to say.
        """
        self.done += steps
        self.note = note
        self.stepped = time.monotonic()

    @property
    def finished(self) -> bool:
        """Return True if all steps are done."""
        return self.done >= self.total

    def extent(self) -> str:
        """Return the size of the whole stage, such as `287,644 tokens`; empty if it has no unit."""
        if self.tokens:
            return f"{self.tokens:,} tokens"
        if self.unit == BYTES:
            return summary.size(self.total)
        return f"{self.total:,} {self.unit}" if self.unit else ""

    def position(self) -> str:
        """Return how far the stage is, such as `3 of 30 blocks` or `45%`."""
        if self.unit == BYTES:
            return f"{summary.size(self.done)} of {summary.size(self.total)}"
        if self.unit:
            return f"{self.done:,} of {self.total:,} {self.unit}"
        return f"{100 * self.done // self.total}%"

    def rate(self) -> str:
        """Return the tokens or bytes a second; empty before the first step, or for other units."""
        seconds, own = self.stepped - self.began, self.done - self.resumed
        amount = self.total if self.unit == BYTES else self.tokens
        if not amount or not own or seconds <= 0:
            return ""
        rate = round(amount * own / self.total / seconds)
        return f"{summary.size(rate)}/s" if self.unit == BYTES else f"{rate:,} tokens/s"

    def time(self) -> str:
        """Return the time that is left at the pace so far; the time spent before the first step."""
        now, own = time.monotonic(), self.done - self.resumed
        if not own:
            return summary.duration(now - self.began)
        pace = (self.stepped - self.began) / own
        # Counted from the last step: while a step runs, the time left falls.
        left = pace * (self.total - self.done) - (now - self.stepped)
        return f"{summary.duration(max(0.0, left))} left"

    def ending(self) -> str:
        """Return the line of the finished stage."""
        spent = f"done in {summary.duration(self.stepped - self.began)}"
        return ", ".join(filter(None, (f"{self.description}: {spent}", self.rate())))


class _Display(Protocol):
    """A way to show stages."""

    def opened(self, stage: Stage) -> None:
        """Show a stage that begins."""

    def stepped(self, stage: Stage) -> None:
        """Show a stage that went on."""

    def close(self) -> None:
        """End the display."""


class _Log:
    """Few plain lines, without control characters."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Of the last line: its stage, its time, and the stage's steps.
        self._last: tuple[Stage, float, int] | None = None

    def opened(self, stage: Stage) -> None:
        """Print that a stage begins."""
        self._print(stage, ": ".join(filter(None, (stage.description, stage.extent()))))

    def stepped(self, stage: Stage) -> None:
        """Print how far a stage is, where a line is due."""
        seconds, steps = stage.stepped - stage.began, stage.done
        if self._last and self._last[0] is stage:
            seconds, steps = stage.stepped - self._last[1], stage.done - self._last[2]
        if stage.finished:
            if stage.stepped - stage.began >= LEAST_SECONDS:
                self._print(stage, stage.ending())
        elif seconds >= MOST_SECONDS or (seconds >= LEAST_SECONDS and steps * PARTS >= stage.total):
            parts = (stage.position(), stage.note, stage.rate(), stage.time())
            figures = ", ".join(filter(None, parts))
            self._print(stage, f"{stage.description}: {figures}")

    def close(self) -> None:
        """Do nothing: a log has no state to restore."""

    def _print(self, stage: Stage, line: str) -> None:
        """Print a line about a stage."""
        self._console.print(Text(line), soft_wrap=True)
        self._last = (stage, stage.stepped, stage.done)


class _Line:
    """One line that is redrawn, and a line that stays for every finished stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._stage: Stage | None = None

    def opened(self, stage: Stage) -> None:
        """Show a stage in place of the one before."""
        self._stage = stage
        if self._live is None:
            # A standard output that goes to a file must not be drawn to the terminal.
            to_terminal = sys.stdout is not None and sys.stdout.isatty()
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES,
                redirect_stdout=to_terminal,
                transient=True,
            )
            self._live.start(refresh=True)

    def stepped(self, stage: Stage) -> None:
        """Show a stage, or its ending."""
        if stage.finished:
            self.close()
            self._console.print(Text(stage.ending()), soft_wrap=True)
        else:
            self.opened(stage)

    def close(self) -> None:
        """Take the line away, and end the thread that redraws it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        """Return the line, as wide as the terminal has room for."""
        return status_line(self._stage, self._console.width) if self._stage else Text("")


def status_line(stage: Stage, width: int) -> Table:
    """Return description, bar and figures of a stage on one line.

    Where there is no room, the bar goes first, then the speed, the time, the note, and the
    description's end.

    Args:
      stage: The stage.
      width: Cells of the line.
    """
    position, note, rate, left = stage.position(), stage.note, stage.rate(), stage.time()
    shorter = ((position, note, rate, left), (position, note, left), (position, note), (position,))
    for parts in shorter:
        figures = ", ".join(filter(None, parts))
        room = max(0, width - cell_len(figures) - 1)
        if room >= min(cell_len(stage.description), DESCRIPTION_CELLS):
            break
    description = set_cell_size(stage.description, min(cell_len(stage.description), room))
    cells: list[RenderableType] = [Text(description)]
    bar = min(GREATEST_BAR, room - cell_len(description) - 1)
    if bar >= LEAST_BAR:
        cells.append(ProgressBar(stage.total, stage.done, width=bar))
    cells.append(Text(figures))
    line = Table.grid(padding=(0, 1))
    for _ in cells:
        line.add_column(no_wrap=True, overflow="crop")
    line.add_row(*cells)
    return line


@contextlib.contextmanager
def progress(console: Console | None = None) -> Iterator[Progress]:
    """Show the progress of work in stages, from the primary process.

    A terminal gets one line that is redrawn, and one that stays for each finished stage. Anything
    else gets plain lines: one when a stage begins, and then at most one for each tenth of it.

    Args:
      console: Where to print; standard error by default.

    Yields:
      The function that begins a stage.
    """
    if not is_primary():
        yield no_progress
        return
    console = console or error_console()
    display: _Display = _Line(console) if console.is_interactive else _Log(console)

    def begin(
        description: str, steps: int, *, unit: str = "", tokens: int = 0, done: int = 0
    ) -> Advance:
        stage = Stage(description, steps, unit, tokens, done)
        if stage.finished:
            return no_advance
        display.opened(stage)

        def advance(steps: int = 1, note: str = "") -> None:
            stage.step(steps, note)
            display.stepped(stage)

        return advance

    try:
        yield begin
    finally:
        display.close()


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Return a function that begins stages whose descriptions have a prefix.

    Args:
      progress: Begins a stage.
      prefix: The text before every description.
    """

    def begin(
        description: str, steps: int, *, unit: str = "", tokens: int = 0, done: int = 0
    ) -> Advance:
        return progress(prefix + description, steps, unit=unit, tokens=tokens, done=done)

    return begin
