"""Which code a result comes from, for an interrupted run to know its own by."""

import functools
import hashlib
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from calibration.journal import file_digest
from launch.flags.calls import parse_call
from launch.run.job import RunConfig
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS

PACKAGES = ("pruning", "calibration", "models", "eval")
MAKERS: dict[str, dict[str, Callable[..., Any]]] = {
    "method": METHODS,
    "allocation": ALLOCATIONS,
    "refine": REFINEMENTS,
}


@functools.cache
def _package(name: str) -> str:
    """SHA-256 of the names and contents of a package's Python files."""
    directory = pathlib.Path(importlib.import_module(name).__path__[0])
    files = sorted(directory.rglob("*.py"))
    return hashlib.sha256(
        "".join(f"{f.relative_to(directory)} {file_digest(f)} " for f in files).encode()
    ).hexdigest()


def code_digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each package that results depend on, and of the file that a method, an allocation or a refinement named in the
    settings is made in, which may be a user's: by a name for people."""
    found = {f"code of {name}": _package(name) for name in PACKAGES}
    for flag, makers in MAKERS.items():
        if text := getattr(config, flag):
            module = sys.modules.get(makers[parse_call(text)[0]].__module__)
            if file := getattr(module, "__file__", None):
                found[f"code of --{flag}"] = file_digest(pathlib.Path(file))
    return found
