"""SHA-256 digests of arrays and files."""

import hashlib
import pathlib

import numpy as np


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's numbers, shape and type, to stand for tokens in a key."""
    return hashlib.sha256(
        f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()
    ).hexdigest()


def token_digest(ids: np.ndarray) -> str:
    """Return the SHA-256 of the bytes of tokens alone, as the report has it.

    Args:
      ids: Token ids, int32 [samples length].
    """
    return hashlib.sha256(ids.tobytes()).hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_digest(path: pathlib.Path) -> str:
    """Return the SHA-256 of what lies at a path, to find out later whether it is still the same.

    Args:
      path: A file, or a directory, whose files count with their names.

    Returns:
      Hexadecimal digits; empty if there is nothing or it cannot be read.
    """
    try:
        if not path.is_dir():
            return file_digest(path)
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            whole.update(f"{file_digest(file)} {file.relative_to(path)}\n".encode())
        return whole.hexdigest()
    except OSError:
        return ""
