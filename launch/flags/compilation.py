"""The flag --compilation_cache: compiled programs kept on disk for later runs and other processes.

Entries are JAX's own, keyed by the program, the versions and the compiler's options. JAX can bound
its folder too, but reads the times of all entries at every write, and a run that is killed between
an entry and its time leaves a folder that takes no more. So the bound is kept here, once a command.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

from jax.experimental.compilation_cache.compilation_cache import reset_cache

from models.errors import InputError
from models.jax_settings import changed, current
from models.untrusted import user_path
from models.user_cache import cache_folder

OFF = "off"
FLAG = "compilation_cache"
LIMIT = 2 * 1024**3  # bytes that the folder may have when a command begins
FOLDER = "jax_compilation_cache_dir"


@contextlib.contextmanager
def compilation_cache(value: str | None) -> Iterator[None]:
    """Let JAX keep compiled programs, here and in processes started here.

    Args:
      value: Value of --compilation_cache; None for a command without it.

    Raises:
      InputError: The folder that the user named cannot be written.
    """
    settings = _settings(value)
    with contextlib.ExitStack() as stack:
        if settings:
            stack.callback(reset_cache)  # JAX reads them only once: again when they are as before
        stack.enter_context(changed(settings))
        if settings:
            reset_cache()
        yield


def _settings(value: str | None) -> dict[str, Any]:
    """Return the settings of JAX that are to change."""
    # Without a wish the folder that the environment or a caller has chosen stays.
    if value is None or (not value and current(FOLDER) is not None):
        return {}
    if value == OFF:
        return {"jax_enable_compilation_cache": False}
    folder = user_path(value, FLAG) if value else default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable and value:
        raise InputError(
            "is no folder that can be written",
            "name another one, or off",
            field=FLAG,
            value=value,
        )
    if not writable:
        return {}  # a home that cannot be written is no reason not to run
    trim(folder, LIMIT)
    # Most programs compile in less than the second that JAX asks for, and there are many.
    seconds = "jax_persistent_cache_min_compile_time_secs"
    return {FOLDER: str(folder), seconds: 0.0, "jax_enable_compilation_cache": True}


def default_folder() -> pathlib.Path:
    """Return the folder of this machine's programs in the user's cache."""
    # Programs use the processor's own instructions, and a home may serve different machines.
    return cache_folder("programs") / _processor()


def _processor() -> str:
    """Return a name of this machine's kind of processor."""
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux alone lists the instructions
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return f"{platform.machine()}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def trim(folder: pathlib.Path, limit: int) -> None:
    """Delete the programs that were not used for longest, until a folder is small enough.

    Args:
      folder: The folder; other processes may use it meanwhile.
      limit: Bytes that may stay.
    """
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            status = path.stat()
            entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(entry[1] for entry in entries)
    for _, bytes_, path in sorted(entries):
        if size <= limit:
            break
        path.unlink(missing_ok=True)
        size -= bytes_
