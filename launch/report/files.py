"""Write and read the files of a report: the JSON, its details by block, and the page."""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from calibration.journal import write_durably
from launch.report import html
from launch.report.outline import outline
from launch.run.export import REPORT
from launch.run.optional import optional

DETAILS = "pruning_details.json"
PAGE = "report.html"
LIMIT = 200_000  # most bytes of the first file
# What only the plots of the page need.
_PLOTTED = ("figures", "scores")
# Parts that grow with the model, besides the details of the method.
_GROWING = (("sparsity", "asked"), ("sparsity", "per_linear"))
# Details that docs/report.md promises: they move only if they must, as all of other methods do.
PROMISED = {
    "llmrank": ("removed",),
    "flap": ("kept_heads", "kept_neurons"),
    "sleb": ("removal_order", "losses"),
}

Path = tuple[str, ...]  # keys of a part, from the outside


def write_reports(directory: pathlib.Path, report: Mapping[str, Any]) -> list[str]:
    """Write a report as pruning_report.json, pruning_details.json and report.html.

    Args:
      directory: Directory of the pruned model.
      report: The whole report.

    Returns:
      A warning if the page could not be made, which the JSON has too; else none.
    """
    page = functools.partial(html.write_html, report, directory / PAGE)
    _, missed = optional(f"no {PAGE}", page, None)
    if missed:
        report = {**report, "warnings": [*report["warnings"], *missed]}
    first, details = _split(report)
    write_durably(directory / DETAILS, _text(details).encode())
    write_durably(directory / REPORT, _text(first).encode())
    return missed


def read_report(directory: pathlib.Path) -> dict[str, Any]:
    """Read a whole report, the parts in pruning_details.json included.

    Args:
      directory: Directory of the pruned model.

    Raises:
      OSError: A file cannot be read.
      ValueError: A file is not JSON.
    """
    report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    moved = report.pop("details_file", None)
    if moved:
        details = json.loads((directory / DETAILS).read_text(encoding="utf-8"))
        for name in moved["holds"]:
            *outer, last = name.split(".", 1)
            part, source = report, details
            for key in outer:
                part, source = part.setdefault(key, {}), source[key]
            part[last] = source[last]
    return report


def _text(value: Mapping[str, Any]) -> str:
    return outline(value) + "\n"


def _split(report: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of the first file and of the second."""
    first = {k: dict(v) if isinstance(v, Mapping) else v for k, v in report.items()}
    details: dict[str, Any] = {}
    holds: list[str] = []

    def move(path: Path) -> None:
        part, target = first, details
        for key in path[:-1]:
            part, target = part[key], target.setdefault(key, {})
        target[path[-1]] = part.pop(path[-1])
        holds.append(".".join(path))

    for key in _PLOTTED:
        if key in first:
            move((key,))
    first["details_file"] = {"name": DETAILS, "holds": holds}
    excess = len(_text(first).encode()) - LIMIT
    parts = sorted(_growing(first), key=lambda part: -part.size)
    spare = [part for part in parts if not part.promised]
    # What users rely on stays, if the first file gets small enough without the rest.
    enough = sum(part.size for part in spare) >= excess
    for part in spare if enough else parts:
        if excess <= 0:
            break
        move(part.path)
        excess -= part.size
    return first, details


class _Part(NamedTuple):
    """A part that grows with the model: its keys, its bytes, and whether users rely on it."""

    path: Path
    size: int
    promised: bool


def _growing(report: Mapping[str, Any]) -> Iterator[_Part]:
    """Yield every part that grows with the model."""
    method = str(report.get("method", "")).partition("(")[0]
    details = report.get("details", {})
    promised = PROMISED.get(method, tuple(details))
    for path in (*_GROWING, *(("details", key) for key in details)):
        part: Any = report
        for key in path:
            part = part.get(key, {})
        if part:
            size = len(_text({path[-1]: part}).encode())
            yield _Part(path, size, path[-1] in (*promised, "per_linear"))
