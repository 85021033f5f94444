"""Output directories that are complete or absent; unfinished work waits beside them."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator

import filelock

from models.errors import InputError
from models.processes import is_primary, run_on_primary

UNFINISHED = "unfinished"  # directory in a staged one, for what an interrupted run continues from


def _keep_nothing(work: pathlib.Path) -> bool:
    return False


def check_free(output: pathlib.Path, marker: str) -> None:
    """Check that an output directory is absent, empty or an earlier result.

    Args:
      output: The directory.
      marker: File that every earlier result has.

    Raises:
      InputError: It is something else.
    """
    if not output.exists() or (output / marker).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise InputError(
            "exists and is not an earlier result",
            "choose another name, or remove it",
            field="output",
            value=output,
        )


def _unwritable(output: pathlib.Path, error: OSError) -> InputError:
    """Return the error for an output that cannot be written."""
    return InputError(
        f"cannot be written ({error.strerror})",
        "choose another place",
        field="output",
        value=output,
    )


@contextlib.contextmanager
def alone(output: pathlib.Path) -> Iterator[None]:
    """Lock an output directory against other processes.

    Args:
      output: The directory.

    Raises:
      InputError: Another process has locked it, or its parent cannot be written.
    """
    lock = filelock.FileLock(output.parent / f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(
            "cannot be used: another run is writing it",
            "wait for that run, or choose another name",
            field="output",
            value=output,
        ) from None
    except OSError as e:
        raise _unwritable(output, e) from None
    try:
        yield
    finally:
        pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def staged(
    output: pathlib.Path,
    marker: str,
    resume: bool = False,
    keep: Callable[[pathlib.Path], bool] = _keep_nothing,
) -> Iterator[pathlib.Path]:
    """Yield a directory that takes the place of the output when the body succeeds.

    The directory lies beside the output. Of several processes the first makes it.

    Args:
      output: The output directory.
      marker: File that an earlier result has, which is replaced.
      resume: Whether to keep UNFINISHED of an interrupted run; it is never part of the result.
      keep: Called with UNFINISHED when the body fails; returns True to keep it.

    Raises:
      InputError: The output is not free, cannot be written or is being written by another run, or
        the disk is full.
    """
    partial = output.parent / f".{output.name}.partial"
    replaced = output.parent / f".{output.name}.replaced"
    with contextlib.ExitStack() as lock:
        run_on_primary(lambda: _prepare(output, partial, marker, resume, lock))
        try:
            yield partial
            run_on_primary(lambda: _replace(output, partial, replaced))
        except BaseException as e:
            if is_primary() and not keep(partial / UNFINISHED):
                shutil.rmtree(partial, ignore_errors=True)
            # Every library raises a type of its own for a full disk.
            if "No space left" in str(e):
                raise InputError(
                    "cannot be written: no space left",
                    "free some, and repeat the command to continue",
                    field="output",
                    value=output,
                ) from None
            raise


def _prepare(
    output: pathlib.Path,
    partial: pathlib.Path,
    marker: str,
    resume: bool,
    lock: contextlib.ExitStack,
) -> None:
    """Lock the output until `lock` closes, and clear the staged directory but for UNFINISHED."""
    check_free(output, marker)
    lock.enter_context(alone(output))
    try:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        # An interrupted run may have begun to write the result; it is written again from the start.
        for path in partial.iterdir():
            if path.name == UNFINISHED:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as e:
        raise _unwritable(output, e) from None


def _replace(output: pathlib.Path, partial: pathlib.Path, replaced: pathlib.Path) -> None:
    """Move the staged directory to the output's place."""
    shutil.rmtree(partial / UNFINISHED, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    # A directory cannot be renamed onto one with files: the earlier result is moved away first.
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
