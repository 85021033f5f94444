"""The user's cache directory, where work is kept for later runs."""

import os
import pathlib


def cache_folder(name: str) -> pathlib.Path:
    """Return `topiary/NAME` in XDG_CACHE_HOME, else in ~/.cache.

    Args:
      name: What is kept there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "topiary" / name
