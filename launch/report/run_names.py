"""Name pruned models by what was done to them, so that no two of a comparison share a name."""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report import summary

# Settings that say nothing of the result.
LEFT_OUT = ("output", "resume", "track", "task_cache", "sparsity")
_ARGUMENTS = re.compile(r"\([^()]*\)")


def join(call: str, amount: str, allocation: str, refine: str, recover: str = "") -> str:
    """Return the name of a run: `wanda 50%, owl(m=7), dsnot, blocks`.

    Args:
      call: The method, as a call.
      amount: Sparsity or pattern, as text; may be empty.
      allocation: The allocation, as a call.
      refine: The refinement, as a call.
      recover: The recoveries, as calls.
    """
    calls = (allocation, refine, recover)
    others = [call for call in calls if call not in ("uniform", "none", "")]
    return ", ".join([f"{call} {amount}".rstrip(), *others])


def amount(pattern: str, sparsity: float | None, target: str = "") -> str:
    """Return how much was to be removed: a target, a pattern, `50%`, or nothing if unknown.

    Args:
      pattern: The pattern, such as `2:4`.
      sparsity: Fraction to remove.
      target: The target, such as `params=100M`.
    """
    if target:
        return target
    if ":" in pattern:
        return pattern
    return "" if sparsity is None else summary.percent(sparsity)


def of_reports(reports: Sequence[Mapping[str, Any]], directories: Sequence[str]) -> list[str]:
    """Return a name for each run; runs that would share one are told apart by what differs.

    Args:
      reports: Contents of their pruning_report.json.
      directories: Their directories, which tell apart runs of equal settings.
    """
    names = [_of_report(report) for report in reports]
    counts = collections.Counter(names)
    return [
        name
        if counts[name] == 1
        else f"{name}, {_difference(k, name, names, reports, directories)}"
        for k, name in enumerate(names)
    ]


def _of_report(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    target = report["sparsity"].get("target")
    size = amount(str(settings.get("pattern") or ""), target, settings.get("target") or "")
    others = (settings.get(key) or "" for key in ("allocation", "refine", "recover"))
    return join(report["method"], size, *others)


def _difference(
    k: int,
    name: str,
    names: Sequence[str],
    reports: Sequence[Mapping[str, Any]],
    directories: Sequence[str],
) -> str:
    """Return what tells run k from the others of its name: its own settings, or its directory."""
    same = [reports[i]["settings"] for i, other in enumerate(names) if other == name]
    differing = [
        key
        for key in same[0]
        if key not in LEFT_OUT and len({str(settings.get(key)) for settings in same}) > 1
    ]
    own = reports[k]["settings"]
    values = [f"{key} {summary.last_component(str(own.get(key)))}" for key in differing]
    every = {tuple(str(settings.get(key)) for key in differing) for settings in same}
    return ", ".join(values) if len(every) == len(same) else pathlib.Path(directories[k]).name


def short(names: Sequence[str]) -> dict[str, str]:
    """Map each name to one without the arguments of its calls, where that stays its own.

    Args:
      names: Names of runs, each once.
    """
    bare = {name: _without_arguments(name) for name in names}
    counts = collections.Counter(bare.values())
    return {name: text if counts[text] == 1 else name for name, text in bare.items()}


def _without_arguments(name: str) -> str:
    """Return a name without parentheses, the innermost removed first."""
    while (shorter := _ARGUMENTS.sub("", name)) != name:
        name = shorter
    return name
