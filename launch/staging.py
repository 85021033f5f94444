"""Output directories that are complete, or not there."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from models.errors import InputError


def check_free(output: pathlib.Path, marker: str) -> None:
    """InputError if something is at `output` that is neither empty nor an earlier result, told by the file `marker` in it."""
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output={output} exists and is not an earlier result: choose another name, or remove it")


@contextlib.contextmanager
def staged(output: pathlib.Path, marker: str) -> Iterator[pathlib.Path]:
    """A fresh directory beside `output`, which takes its place when the body ends without an exception, and else leaves no trace.

    An earlier result is replaced; InputError as `check_free`, or if nothing can be written there.
    """
    check_free(output, marker)
    partial, old = (output.parent / f".{output.name}.{kind}" for kind in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as e:
        raise InputError(f"--output={output} cannot be written ({e.strerror}): choose another place") from None
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
