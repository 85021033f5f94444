"""Tell failures of the disk apart from defects of the program."""

import errno
import os
import re
from collections.abc import Iterator

from launch.run.places import Place, unwritable
from models.errors import InputError
from models.processes import is_primary

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
# NumPy gives no number for a full disk.
NUMPY_FULL = re.compile(r"Not enough free space to write|\d+ requested and \d+ written")


def disk_error(error: BaseException) -> OSError | None:
    """Return the disk's refusal to write that is behind an exception; None for another cause.

    Args:
      error: Exception of any library.
    """
    for e in _causes(error):
        code = _code(e)
        if code in FULL + REFUSED:
            name = e.filename if isinstance(e, OSError) else None
            return OSError(code, os.strerror(code), name)
    return None


def as_input_error(error: Exception, place: Place) -> InputError | None:
    """Return the error for an output that the disk refused or that was removed; None for others.

    Args:
      error: Exception that ended a run.
      place: Place of the run's output.
    """
    if isinstance(error, InputError):
        return None
    refusal = disk_error(error)
    if refusal and refusal.errno in FULL:
        named = refusal.filename and not str(refusal.filename).startswith(_root(place))
        reason = f"{refusal.filename} cannot be written" if named else "cannot be written"
        return InputError(
            f"{reason}: {_says(refusal)}",
            "free some, and repeat the command to continue",
            field="" if named else "output",
            value=None if named else place.output,
        )
    gone = not any(place.path(kind).is_dir() for kind in ("partial", "complete"))
    if is_primary() and gone:  # the first process removes them itself when it fails
        return InputError(
            "was removed while the run wrote to it",
            "repeat the command",
            field="output",
            value=place.output,
        )
    if refusal and str(refusal.filename or _root(place)).startswith(_root(place)):
        return unwritable(place.output, refusal)
    return None


def _says(refusal: OSError) -> str:
    """Return a full disk in words."""
    return {
        errno.ENOSPC: "no space left",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file is larger than the file system or the shell's limit allows",
    }[refusal.errno or errno.ENOSPC]


def _root(place: Place) -> str:
    return str(place.output if place.in_place else place.output.parent)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, those of a group, and those that led to it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        e = waiting.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        waiting += [e.__context__, e.__cause__, *getattr(e, "exceptions", ())]


def _code(error: BaseException) -> int | None:
    """Return the system's number of an error, which most libraries only have in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if NUMPY_FULL.search(text):
        return errno.ENOSPC
    if match := re.search(r"os error (\d+)", text):  # as Rust writes it
        return int(match[1])
    return next((code for code in FULL if os.strerror(code) in text), None)
