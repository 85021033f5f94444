"""Turn SIGTERM into an exception that unwinds the run."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """Raised on SIGTERM, which comes before a machine is taken away, to unwind the run."""


def _raise_terminated(number: int, frame: object) -> None:
    """Handle SIGTERM."""
    raise Terminated


@contextlib.contextmanager
def termination_deferred() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of raising `Terminated`.

    For callers of libraries whose code must not be interrupted by an exception.
    """
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        raise_on_termination()


def raise_on_termination() -> None:
    """Let SIGTERM raise `Terminated`."""
    # Python allows signal handlers to be set from the main thread alone.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_terminated)
