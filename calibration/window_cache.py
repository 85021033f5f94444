"""Windows of tokens on disk, so that a model does not write the same ones twice."""

import contextlib
import hashlib
import io
import json
import pathlib
from typing import Any

import numpy as np

from calibration.journal_files import write_durably
from models.user_cache import cache_folder

_DIGEST = hashlib.sha256().digest_size


def cache_directory() -> pathlib.Path:
    """Return the directory of windows: `topiary/windows` in XDG_CACHE_HOME or ~/.cache."""
    return cache_folder("windows")


def window_file(facts: Any) -> pathlib.Path:
    """Return the file of the windows that depend on facts.

    Args:
      facts: JSON-able values that decide every token.
    """
    content = json.dumps(facts, sort_keys=True)
    return cache_directory() / f"{hashlib.sha256(content.encode()).hexdigest()}.windows"


def read_windows(file: pathlib.Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Read windows.

    Args:
      file: Their file.
      shape: Samples and length.

    Returns:
      Token ids, int32 [samples length]; None if the file is missing, damaged or of another shape.
    """
    try:
        data = file.read_bytes()
        digest, content = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            return None
        ids = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError):
        return None
    return ids if ids.shape == shape else None


def write_windows(file: pathlib.Path, ids: np.ndarray) -> None:
    """Write windows behind their digest.

    Args:
      file: Their file.
      ids: Token ids, int32 [samples length].
    """
    content = io.BytesIO()
    np.save(content, ids)
    data = hashlib.sha256(content.getvalue()).digest() + content.getvalue()
    # A full or read-only home directory costs the copy, not the run.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, data)
