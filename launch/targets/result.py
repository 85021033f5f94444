"""Measure what a target asked for on the written checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from launch.report.removal import LinearCounts
from launch.report.targets import figures, target_of
from launch.run.export import Written as WrittenCheckpoint
from launch.targets.latency import Stopwatch, Workload, steady, time_models
from launch.targets.shapes import Written
from launch.targets.sizes import Storage, memory_bytes
from launch.targets.syntax import Target
from models.arch import Model
from models.checkpoint.reader import Checkpoint, in_memory, open_checkpoint
from models.families import hf
from models.processes import run_on_primary
from pruning.figures import to_json

# Names of the two models that are timed.
DENSE, PRUNED = "dense", "pruned"


def add_result(
    report: dict[str, Any],
    record: Mapping[str, Any],
    checkpoint: Checkpoint,
    written: WrittenCheckpoint,
    counts: LinearCounts,
    stopwatch: Stopwatch = time_models,
) -> None:
    """Add to a report its `target`, with what the result has, and the search as tables.

    Args:
      report: The report; a target that is missed is among its warnings.
      record: The beginning of `target`, as `launch.targets.resolve` returns it.
      checkpoint: The dense model.
      written: The result.
      counts: Weights by linear.
      stopwatch: Times models, for a target of latency.
    """
    target = target_of(record)
    if target.kind == "latency":
        seconds = run_on_primary(
            lambda: _seconds(target, record["dtype"], checkpoint, written.loaded, stopwatch)
        )
        got = seconds[DENSE] / seconds[PRUNED]
        reached = {"got": got, "met": got >= target.amount, "seconds": seconds}
    else:
        size = _size(target, Storage(record["dtype"], record["pack"]), written, counts)
        reached = {"got": size, "met": size <= target.amount}
    report["target"] = {**record, **reached}
    report["figures"] += [to_json(figure) for figure in figures(record)]
    if not reached["met"]:
        report["warnings"].append(_missed(report["target"], target))


def _size(
    target: Target, storage: Storage, written: WrittenCheckpoint, counts: LinearCounts
) -> int:
    """Return the parameters or bytes of the written checkpoint."""
    loaded = written.loaded
    _, non_block, blocks = hf.specs(loaded.config)
    shapes = Written(loaded.config, non_block, blocks, {})
    if target.kind == "memory":
        return memory_bytes(shapes, storage, target.batch, target.length)
    packed = written.other_formats.get("pack")
    if target.kind == "weights":
        return packed["packed"] if packed else loaded.stored_bytes
    if not packed:
        return loaded.parameters
    in_linears = sum(math.prod(shape) for shape in shapes.linears.values())
    left = sum(counts.dense.values()) - sum(counts.removed.values())
    return loaded.parameters - in_linears + left


def _seconds(
    target: Target,
    dtype: str,
    dense: Checkpoint,
    pruned: Checkpoint,
    stopwatch: Stopwatch,
) -> dict[str, float]:
    """Return the seconds of the dense and of the pruned model, both whole in memory."""
    work = Workload(target.phase, target.batch, target.length, dtype)

    def read(checkpoint: Checkpoint) -> Model:
        return in_memory(open_checkpoint(checkpoint.directory, jnp.dtype(dtype)).model)

    return steady(stopwatch({DENSE: read(dense), PRUNED: read(pruned)}, work), DENSE)


def _missed(record: Mapping[str, Any], target: Target) -> str:
    """Return what a reader must know where the result misses its target."""
    got = target.show_value(record["got"])
    if target.kind == "latency":
        return (
            f"the result measures {got}, the target is {target.text}: ask for a little more; "
            "times on a busy machine drift"
        )
    return (
        f"the result has {got}, more than the target {target.text}: the data decided which units "
        f"stay, and {target.show_value(record['predicted'])} was predicted; ask for a little less"
    )
