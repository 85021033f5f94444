"""SHA-256 digests of arrays and files."""

import hashlib
import pathlib

import numpy as np


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's numbers, shape and type, to stand for tokens in a key."""
    return hashlib.sha256(
        f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()
    ).hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
