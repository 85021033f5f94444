"""Make what only decorates a report, without ever losing the run to it."""

from collections.abc import Callable
from typing import TypeVar

from launch.run.write_errors import disk_error
from models.errors import first_line
from models.untrusted import is_panic

T = TypeVar("T")


def optional(without: str, compute: Callable[[], T], otherwise: T) -> tuple[T, list[str]]:
    """Return a value, or a substitute and a warning if it cannot be computed.

    Args:
      without: Start of the warning, such as "no sample texts".
      compute: Computes the value; what it raises of any kind becomes the warning.
      otherwise: The substitute.

    Returns:
      The value, and no or one warning.

    Raises:
      Exception: The disk is full or refuses to be written, which the checkpoint needs as well.
    """
    try:
        return compute(), []
    except BaseException as e:
        if not isinstance(e, Exception) and not is_panic(e):
            raise
        if disk_error(e):
            raise
        return otherwise, [f"{without}: {first_line(e)}"]
