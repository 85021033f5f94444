"""Find out where an output is written, and refuse places that cannot be written."""

import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from models.errors import InputError

# Our own files in an output that is written in place; `lost+found` is the file system's.
KINDS = ("lock", "partial", "complete", "replaced", "unfinished", "removed")
HIDDEN = frozenset(f".{kind}" for kind in KINDS)
OWN = HIDDEN | {"lost+found"}
LONGEST_SUFFIX = len("..unfinished")  # added to the output's name beside it
DEEPEST_FILE = 256  # bytes of the longest path below an output, those of Orbax
MOUNTS = pathlib.Path("/proc/self/mountinfo")  # Linux alone


class Place(NamedTuple):
    """Place of an output.

    Attributes:
      output: The output directory, links followed.
      in_place: Whether the output stays and gets files moved into it; else it is renamed to.
    """

    output: pathlib.Path
    in_place: bool

    def path(self, kind: str) -> pathlib.Path:
        """Return one of our own files, on the output's file system.

        Args:
          kind: One of KINDS.
        """
        if self.in_place:
            return self.output / f".{kind}"
        return self.output.parent / f".{self.output.name}.{kind}"


def unwritable(output: pathlib.Path, error: OSError) -> InputError:
    """Return the error for an output that cannot be written.

    Args:
      output: The output as the user named it.
      error: What the system said.
    """
    return InputError(
        f"cannot be written ({error.strerror})",
        "choose another place",
        field="output",
        value=output,
    )


def check_free(output: pathlib.Path, marker: str) -> None:
    """Check that an output can be written, and that it is absent, empty or an earlier result.

    Args:
      output: The output as the user named it.
      marker: File that every earlier result has.

    Raises:
      InputError: It is something else, or cannot be written.
    """
    try:
        if "\0" in str(output):
            raise OSError(22, "Invalid argument")
        resolved = resolve(output)
        # Reports and safetensors hold names as UTF-8.
        f"{output}{resolved}".encode()
        _check_length(output, resolved)
        if not _is_free(resolved, marker):
            raise InputError(
                "exists and is not an earlier result",
                "choose another name, or remove it",
                field="output",
                value=output,
            )
        _check_writable(locate(output, marker))
    except UnicodeEncodeError:
        raise InputError(
            "is not valid UTF-8", "choose another name", field="output", value=output
        ) from None
    except OSError as e:
        raise unwritable(output, e) from None


def locate(output: pathlib.Path, marker: str) -> Place:
    """Return the place of an output.

    Args:
      output: The output as the user named it.
      marker: File that every earlier result has.
    """
    resolved = resolve(output)
    if not resolved.is_dir():
        return Place(resolved, in_place=False)
    names = {path.name for path in resolved.iterdir()}
    # What a run has begun in place goes on in place.
    earlier = marker in names and not names & HIDDEN
    return Place(resolved, in_place=not earlier or not _can_be_renamed(resolved))


def check_space(directory: pathlib.Path, needed: int, written: Sequence[pathlib.Path]) -> None:
    """Check that a disk has room for a result, as far as its size is known before the work.

    Args:
      directory: Directory on the disk.
      needed: Bytes of the result, at least.
      written: Files that an interrupted run has of it.

    Raises:
      InputError: It has not.
    """
    free = shutil.disk_usage(directory).free
    missing = needed - sum(file.stat().st_size for file in written)
    if missing > free:
        raise InputError(
            f"is on a disk with {_mib(free)} free, and the result takes {_mib(missing)} or more",
            "free some, or choose another place",
            field="output",
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def resolve(output: pathlib.Path) -> pathlib.Path:
    """Return the absolute path that links lead to, also one that does not exist yet.

    Args:
      output: A path as the user gave it.
    """
    return pathlib.Path(os.path.realpath(output))


def _check_length(output: pathlib.Path, resolved: pathlib.Path) -> None:
    """Check that our own names beside and below the output are not too long."""
    parent = _existing(resolved.parent)
    name = len(os.fsencode(resolved.name)) + LONGEST_SUFFIX
    path = len(os.fsencode(resolved)) + DEEPEST_FILE
    if name > os.pathconf(parent, "PC_NAME_MAX") or path > os.pathconf(parent, "PC_PATH_MAX"):
        raise InputError("is too long a name", "choose a shorter one", field="output", value=output)


def _existing(path: pathlib.Path) -> pathlib.Path:
    """Return the path, or its nearest parent that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def _is_free(resolved: pathlib.Path, marker: str) -> bool:
    """Return whether nothing is there but a result, or what an interrupted run left."""
    if not os.path.lexists(resolved):
        return True
    if not resolved.is_dir():
        return False
    names = {path.name for path in resolved.iterdir()}
    # Both stand for a result on its way in or out, whose marker may not be there.
    return not names - OWN or bool(names & {marker, ".complete", ".replaced"})


def _check_writable(place: Place) -> None:
    """Raise OSError if a directory can be seen to refuse new files."""
    directory = place.output if place.in_place else _existing(place.output.parent)
    if not directory.is_dir():
        raise NotADirectoryError(20, "Not a directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied")


def _can_be_renamed(directory: pathlib.Path) -> bool:
    """Return whether a directory is neither a mount point nor the shell's own, and may be moved."""
    here = resolve(pathlib.Path("."))
    return not (
        os.path.ismount(directory)
        or str(directory) in _mount_points()
        or directory in (here, *here.parents)
        or not os.access(directory.parent, os.W_OK | os.X_OK)
    )


def _mount_points() -> list[str]:
    """Return all mount points, those of directories on the same disk included."""
    # Python's `ismount` does not see those.
    if not MOUNTS.is_file():
        return []
    points = [line.split()[4] for line in MOUNTS.read_text(errors="replace").splitlines()]
    return [point.encode().decode("unicode_escape") for point in points]  # a space is \040
