"""Show a recovered model beside the dense and the pruned one, and judge it as the result."""

from collections.abc import Mapping
from typing import Any

from launch.report import summary

RECOVERED = "recovered"


def final(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the report with the figures of the recovered model as those of the pruned one.

    Without a recovery it is the report itself.

    Args:
      report: Content of pruning_report.json.
    """
    if "recovery" not in report:
        return report

    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        of_recovered = {
            key.replace(RECOVERED, "pruned"): value
            for key, value in values.items()
            if key.startswith(RECOVERED)
        }
        others = {k: v for k, v in values.items() if not k.startswith(RECOVERED)}
        return others | of_recovered

    return {
        **report,
        "perplexity": {name: moved(v) for name, v in report.get("perplexity", {}).items()},
        "tasks": {name: moved(v) for name, v in report.get("tasks", {}).items()},
        "agreement": {name: v.get(RECOVERED, v) for name, v in report.get("agreement", {}).items()},
        "samples": [moved(sample) for sample in report.get("samples") or []],
    }


def headings(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the headings of the summary table behind the first column.

    Args:
      report: Content of pruning_report.json.
    """
    models = ("dense", "pruned", RECOVERED) if "recovery" in report else ("dense", "pruned")
    return (*models, "change")


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the summary table's rows, from the label to the change.

    The change is that of the result: of the recovered model where there is one.

    Args:
      report: Content of pruning_report.json; every key may be missing.
    """
    pruned = summary.quality_rows(report)
    if "recovery" not in report:
        return [tuple(row) for row in pruned]
    result = summary.quality_rows(final(report))
    return [
        (a.label, a.dense, a.pruned, b.pruned, b.change)
        for a, b in zip(pruned, result, strict=True)
    ]
