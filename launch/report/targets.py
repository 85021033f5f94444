"""Describe a run's target: what was asked, predicted and got, and the search for it."""

from collections.abc import Mapping
from typing import Any

from launch.targets.syntax import Target, parse_target
from pruning.figures import Table

# Names of the quantities, for people.
QUANTITIES = {
    "params": "parameters",
    "weights": "bytes of the weight files",
    "memory": "bytes of weights and cache",
    "latency": "speed-up",
}


def target_of(record: Mapping[str, Any]) -> Target:
    """Return the target that a report's `target` is about."""
    return parse_target(record["target"])


def quantity(record: Mapping[str, Any]) -> str:
    """Return what a target bounds, in words."""
    texts = f", {record['texts']}" if record["texts"] else ""
    pack = f", {record['pack']} pack" if record["pack"] != "none" else ""
    return f"{QUANTITIES[record['kind']]}{texts}{pack}"


def search_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return sparsity, shape and value of each trial, the smallest sparsity first."""
    show = target_of(record).show_value
    tried = sorted(record["tried"], key=lambda trial: trial["sparsity"])
    return [(f"{t['sparsity']:.6g}", t["shape"], show(t["value"])) for t in tried]


def summary_row(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the row of a report's summary: name, dense, pruned, and what was predicted."""
    show = target_of(record).show_value
    values = [show(record[key]) if key in record else "" for key in ("dense", "got", "predicted")]
    return (f"Target {record['target']}", values[0], values[1], f"predicted {values[2]}")


def figures(record: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a report: the search, and the times that it went by.

    Args:
      record: The report's `target`.
    """
    title = f"Search for {record['target']}"
    caption = f"{quantity(record).capitalize()}. Chosen: sparsity {record['sparsity']:.6g}."
    if "first" in record:
        caption += (
            " Searched among the units that the scores leave; before them, shapes alone gave "
            f"{record['first']['sparsity']:.6g}."
        )
    columns = ("sparsity", "what stays", "predicted")
    tables = [Table(title, columns, search_rows(record), caption=caption)]
    if "table" in record:
        tables.append(_times(record["table"], record["texts"]))
    return tables


def _times(table: Mapping[str, Any], texts: str) -> Table:
    """Return the measured table of block shapes."""
    rows: list[tuple[str, float]] = [("all but the blocks", 1e3 * table["outside_seconds"])]
    for block in table["blocks"]:
        kind = "block with experts" if block["shape"][2] else "block"
        rows.append((f"dense {kind}", 1e3 * block["dense_seconds"]))
        for axis in ("heads", "neurons", "experts"):
            curve = block["curves"].get(axis, {"units": (), "seconds": ()})
            rows += [
                (f"{kind}, {units:,} {axis}", 1e3 * seconds)
                for units, seconds in zip(curve["units"], curve["seconds"], strict=True)
            ]
    return Table(
        "Measured times of block shapes",
        ("part", "ms"),
        [(name, float(f"{ms:.4g}")) for name, ms in rows],
        caption=f"Medians on {table['device']}, {texts}. What lies between two is interpolated.",
    )
