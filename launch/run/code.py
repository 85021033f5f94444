"""Code digests, so that a run resumes only with unchanged code."""

import functools
import hashlib
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from calibration.digests import file_digest
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
    """Return the SHA-256 of the names and contents of a package's Python files."""
    directory = pathlib.Path(importlib.import_module(name).__path__[0])
    files = sorted(directory.rglob("*.py"))
    lines = [f"{file.relative_to(directory)} {file_digest(file)} " for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def package_digests() -> dict[str, str]:
    """Return the SHA-256 of the code of each package, by a name that users know."""
    return {f"code of {name}": _package(name) for name in PACKAGES}


def code_digests(config: RunConfig) -> dict[str, str]:
    """Compute the SHA-256 of all code that a run's result depends on.

    Args:
      config: Settings of the run.

    Returns:
      Digests by a name that users know: of each package, and of the file that defines the method,
      the allocation and the refinement.
    """
    digests = package_digests()
    for flag, makers in MAKERS.items():
        text = getattr(config, flag)
        if not text:
            continue
        # The method may be a user's own, from a file outside the packages.
        module = sys.modules.get(makers[parse_call(text)[0]].__module__)
        file = getattr(module, "__file__", None)
        if file:
            digests[f"code of --{flag}"] = file_digest(pathlib.Path(file))
    return digests
