"""Show downloads as they arrive, in bytes."""

import contextlib
import threading
from collections.abc import Iterator

from rich.console import Console

from launch.report.progress import BYTES, progress
from models.checkpoint import hub_client
from models.progress import Advance


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
    lock, arrived = threading.Lock(), 0
    advance: Advance | None = None
    with progress(console) as begin:

        def report(done: int, total: int) -> None:
            nonlocal arrived, advance
            with lock:
                if advance is None:
                    advance = begin(description, total, unit=BYTES)
                # A part that is sent again does not count twice.
                if done > arrived:
                    advance(done - arrived)
                    arrived = done

        yield report
