"""Show downloads as they arrive: a bar on a terminal, a few lines in a log."""

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from launch.report import summary
from models.checkpoint import hub_client
from models.processes import is_primary

LINES = 10  # most lines of a download in a log
PAUSE = 5.0  # least seconds between two of them, so that a quick download has its last line alone


@contextlib.contextmanager
def download(description: str, console: Console | None = None) -> Iterator[hub_client.Progress]:
    """Show the progress of a download, from the primary process.

    Args:
      description: What is downloaded.
      console: Where to print; standard error by default.

    Yields:
      A function to call with the bytes that have arrived and those that are wanted; threads may
      share it.
    """
    console = console or Console(stderr=True)
    if not is_primary():
        yield lambda done, total: None
    elif console.is_interactive:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(description, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
    else:
        lines = _Lines(description, console)
        yield lines
        lines.finish()


class _Lines:
    """Prints a line after about every tenth of a download, and one at its end."""

    def __init__(self, description: str, console: Console) -> None:
        self._description, self._console = description, console
        self._start = self._last = time.monotonic()
        self._done = self._total = self._shown = 0
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            self._done, self._total = done, total
            now, step = time.monotonic(), done * LINES // max(total, 1)
            if step > self._shown and now - self._last >= PAUSE and done < total:
                self._shown, self._last = step, now
                elapsed = now - self._start
                left = summary.duration(elapsed / done * (total - done))
                size = f"{summary.size(done)} of {summary.size(total)}"
                self._print(f"{size}, {summary.duration(elapsed)} elapsed, {left} left")

    def finish(self) -> None:
        """Print the last line."""
        if self._done:
            seconds = summary.duration(time.monotonic() - self._start)
            self._print(f"{summary.size(self._done)} in {seconds}")

    def _print(self, text: str) -> None:
        self._console.print(Text(f"{self._description}: {text}"), soft_wrap=True)
