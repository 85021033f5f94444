"""Output directories that are complete or absent; unfinished work waits beside or inside them.

A result is written to a directory of its own and moved to the output by renames. One rename commits
it: from there on whoever comes next, this run or a later one, only has to finish the moves.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import filelock

from launch.run.places import OWN, Place, check_free, locate, resolve, unwritable
from launch.run.write_errors import as_input_error
from models.errors import InputError
from models.processes import is_primary, run_on_primary


class Stage(NamedTuple):
    """Directories of a result in the making.

    Attributes:
      result: Directory that takes the place of the output.
      work: Directory, made by the body, for what an interrupted run continues from.
    """

    result: pathlib.Path
    work: pathlib.Path


def _keep_nothing(work: pathlib.Path) -> bool:
    return False


@contextlib.contextmanager
def alone(output: pathlib.Path) -> Iterator[None]:
    """Make an output directory that is written in place, and lock it against other processes.

    Args:
      output: The directory.

    Raises:
      InputError: Another process has locked it, or it cannot be written.
    """
    place = Place(resolve(output), in_place=True)
    try:
        place.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(output, e) from None
    with _locked(place):
        yield


def discard_work(output: pathlib.Path, marker: str) -> None:
    """Remove what an interrupted run has left for an output.

    Args:
      output: The output directory.
      marker: File that a result has.

    Raises:
      InputError: Another run is writing it.
    """
    place = locate(output, marker)
    if place.path("unfinished").exists():
        with _locked(place):
            _clear(place, keep_work=False)


@contextlib.contextmanager
def _locked(place: Place) -> Iterator[None]:
    """Lock a place; InputError if another process has locked it or it cannot be written."""
    lock = filelock.FileLock(place.path("lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(
            "cannot be used: another run is writing it",
            "wait for that run, or choose another name",
            field="output",
            value=place.output,
        ) from None
    except OSError as e:
        raise unwritable(place.output, e) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the whole place may be gone
            pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def staged(
    output: pathlib.Path,
    marker: str,
    resume: bool = False,
    keep: Callable[[pathlib.Path], bool] = _keep_nothing,
) -> Iterator[Stage]:
    """Yield directories, of which `result` becomes the output when the body succeeds.

    A link is followed. A directory that is there already and cannot be renamed, such as a mount
    point, is written in place. Of several processes the first makes the directories.

    Args:
      output: The output directory.
      marker: File that an earlier result has, which is replaced.
      resume: Whether to keep the work of an interrupted run; it is never part of the result.
      keep: Called with the work's directory when the body fails; returns True to keep it.

    Raises:
      InputError: The output is not free, cannot be written or is being written by another run, its
        disk is full, or somebody removed it meanwhile.
    """
    with contextlib.ExitStack() as lock:
        # Paths travel between processes as text.
        text, in_place = run_on_primary(lambda: _prepare(output, marker, resume, lock))
        place = Place(pathlib.Path(text), in_place)
        stage = Stage(place.path("partial"), place.path("unfinished"))
        try:
            yield stage
            run_on_primary(lambda: _finish(place))
        except BaseException as e:
            error = as_input_error(e, place) if isinstance(e, Exception) else None
            if is_primary():
                _clear(place, keep_work=keep(stage.work))
            if error:
                raise error from e
            raise


def _prepare(
    output: pathlib.Path, marker: str, resume: bool, lock: contextlib.ExitStack
) -> tuple[str, bool]:
    """Lock the output until `lock` closes, and make an empty directory for the result."""
    check_free(output, marker)
    place = locate(output, marker)
    try:
        place.output.parent.mkdir(parents=True, exist_ok=True)
        lock.enter_context(_locked(place))
        _publish(place)
        # An interrupted run may have begun to write the result; it is written again from the start.
        _clear(place, keep_work=resume)
        place.path("partial").mkdir()
    except OSError as e:
        raise unwritable(output, e) from None
    return str(place.output), place.in_place


def _clear(place: Place, keep_work: bool) -> None:
    """Remove what runs have left; the unfinished work on request alone."""
    for kind in ("partial", "removed") if keep_work else ("partial", "removed", "unfinished"):
        shutil.rmtree(place.path(kind), ignore_errors=True)


def _finish(place: Place) -> None:
    """Move the result to the output, then remove the unfinished work."""
    if place.in_place:
        # The earlier result goes first: once files of both lie there, nobody can tell them apart.
        _move_out(place)
    place.path("partial").rename(place.path("complete"))
    _publish(place)
    # Renamed before it is removed: a part of it must never be taken for the work of a run.
    if place.path("unfinished").exists():
        place.path("unfinished").rename(place.path("removed"))
    shutil.rmtree(place.path("removed"), ignore_errors=True)


def _move_out(place: Place) -> None:
    """Remove the files of an earlier result from an output that is written in place."""
    replaced = place.path("replaced")
    # Moved first: while this directory exists, all that lies beside it belongs to that result.
    visible = [path for path in place.output.iterdir() if path.name not in OWN]
    if visible:
        replaced.mkdir(exist_ok=True)
    for path in visible:
        path.rename(replaced / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


def _publish(place: Place) -> None:
    """Move a complete result to the output, where a killed run may have begun to."""
    complete, replaced = place.path("complete"), place.path("replaced")
    if not complete.exists():
        if place.in_place and replaced.exists():
            _move_out(place)
    elif place.in_place:
        # The weights first: a directory with config.json counts as a checkpoint.
        for path in sorted(complete.iterdir(), key=lambda p: (p.suffix == ".json", p.name)):
            path.rename(place.output / path.name)
        complete.rmdir()
    else:
        # A directory cannot be renamed onto one with files: the earlier result is moved away first.
        if place.output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            place.output.rename(replaced)
        complete.rename(place.output)
    shutil.rmtree(replaced, ignore_errors=True)
