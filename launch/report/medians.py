"""Join the reports of runs that are repetitions of one another: the median of every figure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report import run_names

# Settings that repetitions may differ in: rounding, windows and the place of the output.
_REPEATED = ("seed", "calibration_batch")


def of_reports(reports: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the runs that are repetitions of one another, as indices in their order.

    Args:
      reports: Contents of their pruning_report.json.
    """
    groups: dict[str, list[int]] = {}
    for k, report in enumerate(reports):
        groups.setdefault(_what_was_done(report), []).append(k)
    return list(groups.values())


def _what_was_done(report: Mapping[str, Any]) -> str:
    """Return model, method and settings without those that repetitions may differ in."""
    left_out = {*_REPEATED, *run_names.LEFT_OUT}
    settings = {k: v for k, v in report["settings"].items() if k not in left_out}
    size = report["sparsity"].get("target")
    return str([report.get("model"), report["method"], size, sorted(settings.items())])


def median(values: Sequence[Any]) -> Any:
    """Return the median of numbers, of dictionaries key by key; the first of anything else.

    Args:
      values: The same part of each report.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {
            key: median([value[key] for value in values if key in value])
            for key in dict.fromkeys(key for value in values for key in value)
        }
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or len(set(numbers)) == 1:
        return first
    return statistics.median(numbers)
