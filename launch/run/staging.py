"""Output directories that are complete, or not there; what an interrupted run has finished waits beside."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator

import filelock

from models.errors import InputError
from models.processes import is_primary, run_on_primary

UNFINISHED = "unfinished"  # within a staged directory: what an interrupted run goes on from


def check_free(output: pathlib.Path, marker: str) -> None:
    """InputError if something is at `output` that is neither empty nor an earlier result, told by the file `marker` in it."""
    if (
        output.exists()
        and not (output / marker).is_file()
        and not (output.is_dir() and not any(output.iterdir()))
    ):
        raise InputError(
            f"--output={output} exists and is not an earlier result: choose another name, or remove it"
        )


@contextlib.contextmanager
def alone(output: pathlib.Path) -> Iterator[None]:
    """InputError while another process is in here for the same output."""
    lock = filelock.FileLock(output.parent / f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(
            f"--output={output}: another run is writing it: wait for that, or choose another name"
        ) from None
    except OSError as e:
        raise InputError(
            f"--output={output} cannot be written ({e.strerror}): choose another place"
        ) from None
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
    begun: Callable[[], bool] = lambda: False,
) -> Iterator[pathlib.Path]:
    """A directory beside `output`, which takes its place when the body ends without an exception; of several processes the first makes it.

    Args:
      marker: the file that tells an earlier result, which is replaced.
      resume: go on with what an interrupted run left there in UNFINISHED, which is no part of the result; else it is removed.
      begun: whether what is there is worth keeping when the body fails; if not, no trace is left.
    Raises InputError as `check_free`, if nothing can be written there, if another run is at it, or if the disk is full.
    """
    partial, old = (output.parent / f".{output.name}.{kind}" for kind in ("partial", "replaced"))
    with contextlib.ExitStack() as held:
        run_on_primary(lambda: _prepare(output, partial, marker, resume, held))
        try:
            yield partial
            run_on_primary(lambda: _replace(output, partial, old))
        except BaseException as e:
            if is_primary() and not begun():
                shutil.rmtree(partial, ignore_errors=True)
            if "No space left" in str(e):  # every library says it, each in a type of its own
                raise InputError(
                    f"no space left for --output={output}: free some, and the same command goes on"
                ) from None
            raise


def _prepare(
    output: pathlib.Path,
    partial: pathlib.Path,
    marker: str,
    resume: bool,
    held: contextlib.ExitStack,
) -> None:
    """Lock the output until `held` closes, and clear the staged directory of all but what a run goes on from."""
    check_free(output, marker)
    held.enter_context(alone(output))
    try:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        for path in partial.iterdir():  # what an interrupted run had begun to make of its blocks
            if path.name != UNFINISHED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as e:
        raise InputError(
            f"--output={output} cannot be written ({e.strerror}): choose another place"
        ) from None


def _replace(output: pathlib.Path, partial: pathlib.Path, old: pathlib.Path) -> None:
    """Put the staged directory in the output's place."""
    shutil.rmtree(partial / UNFINISHED, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)
