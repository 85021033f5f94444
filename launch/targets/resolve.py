"""Find what a method must remove to meet a target, before any calibration."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from calibration.journal import write_durably
from launch.flags.dtypes import stored_dtype
from launch.report import console
from launch.run.job import Job
from launch.targets.latency import (
    LatencyTable,
    Stopwatch,
    Workload,
    changed_axes,
    check_positions,
    measure_table,
    shapes_of,
    time_models,
)
from launch.targets.search import Search, search
from launch.targets.shapes import Subject, Written
from launch.targets.sizes import Storage, size_of
from launch.targets.syntax import Target
from models.checkpoint.reader import Checkpoint
from models.errors import InputError
from models.processes import run_on_primary

JOURNAL = "journal"  # directory beside it, once the run has begun
FILE = "target.json"  # the search of an unfinished run, in its work directory
# Sparsities at which a method that removes units or blocks removes some, as far as it takes them.
PROBES = (0.5, 0.25, 0.1, 0.05)


def describe_shape(written: Written) -> str:
    """Return what stays, in words: `24 blocks, 3 heads, 1,205 neurons`."""
    shapes = shapes_of(written)
    parts = [f"{len(shapes)} blocks"]
    for unit in ("heads", "neurons", "experts"):
        counts = sorted({getattr(s, unit) for s in shapes} - {0})
        if counts:
            span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
            parts.append(f"{span} {unit}")
    return ", ".join(parts)


class _Costs:
    """Costs of what a method writes, with the shape of each trial.

    Args:
      subject: The model on shapes and the method.
      target: The target.
      storage: How the weights are stored.
      table: Measured seconds by block shape, for a target of latency.
    """

    def __init__(
        self, subject: Subject, target: Target, storage: Storage, table: LatencyTable | None
    ) -> None:
        self._subject, self._target, self._storage = subject, target, storage
        self._table = table
        self.shapes: dict[float, str] = {}

    def __call__(self, sparsity: float) -> float:
        written = self._subject.at(sparsity) if sparsity else self._subject.dense
        self.shapes[sparsity] = describe_shape(written)
        if self._table:
            return self._table.seconds(written) / self._table.seconds(self._subject.dense)
        return size_of(self._target, written, self._storage)


def _measure_table(
    subject: Subject, target: Target, storage: Storage, stopwatch: Stopwatch
) -> LatencyTable | None:
    """Time blocks of the shapes that a method may leave; None where it changes no shape."""
    check_positions(target, subject.dense)
    probe = next((s for s in PROBES if subject.accepts(s)), 0.0)
    if shapes_of(subject.at(probe)) == shapes_of(subject.dense):
        return None
    console.note(f"target {target.text}: timing blocks of a few shapes on this device")
    work = Workload(target.phase, target.batch, target.length, storage.dtype)
    return measure_table(subject.dense, changed_axes(subject, [probe]), work, stopwatch)


def _resolution(subject: Subject) -> float:
    """Return a sparsity below that of any single unit of the model."""
    shapes = shapes_of(subject.dense)
    units = sum(s.heads + s.neurons * max(s.experts, 1) + s.experts for s in shapes)
    return 1 / (4 * (units + max(map(max, subject.dense.linears.values()))))


def resolve_target(
    subject: Subject,
    target: Target,
    storage: Storage,
    name: str,
    stopwatch: Stopwatch = time_models,
) -> dict[str, Any]:
    """Find the smallest sparsity that meets a target.

    Args:
      subject: The model on shapes and the method.
      target: The target.
      storage: How the weights are stored.
      name: The method as the user wrote it.
      stopwatch: Times models, for a target of latency.

    Returns:
      The beginning of the report's `target`: what was asked and predicted, the `sparsity` to ask
      of the method, and what was tried.

    Raises:
      InputError: The dense model meets the target already, or no sparsity does.
    """
    table = None
    if target.kind == "latency":
        table = _measure_table(subject, target, storage, stopwatch)
        if table is None:
            raise _impossible(target, name, Search(None, 1.0, (), 0.0), 1.0, storage)
    costs = _Costs(subject, target, storage, table)
    found = search(costs, subject.accepts, target.limit, _resolution(subject))
    dense = costs(0.0)
    if found.sparsity == 0:
        raise InputError(
            f"is met by the dense model, which has {target.show(dense)}",
            "ask for less",
            field="target",
            value=target.text,
        )
    if found.sparsity is None:
        raise _impossible(target, name, found, dense, storage)
    tried = [
        {"sparsity": s, "shape": costs.shapes[s], "value": target.value(c)} for s, c in found.tried
    ]
    return {
        "target": target.text,
        "kind": target.kind,
        "texts": target.workload,
        **storage._asdict(),
        "sparsity": found.sparsity,
        "shape": costs.shapes[found.sparsity],
        "asked": target.amount,
        "dense": target.value(dense),
        "predicted": target.value(found.cost),
        "tried": tried,
        **({"table": table.to_json(jax.devices()[0].device_kind)} if table else {}),
    }


def _impossible(
    target: Target, name: str, found: Search, dense: float, storage: Storage
) -> InputError:
    """Return the error for a target that no sparsity meets."""
    nearest = f"the nearest possible is {target.reachable(found.cost)}"
    if found.cost < dense:
        reason = f"is out of reach of {name}: {nearest}, at `sparsity`={found.nearest:.6g}"
        remedy = "ask for that, or choose another method"
    else:
        reason = f"is out of reach of {name}, whose zeros stay in place: {nearest}"
        remedy = "choose a method that removes units or blocks, such as flap, llmrank or sleb"
        if target.kind in ("params", "weights") and storage.pack == "none":
            remedy += ", or give `pack`=bitmask, which stores no zeros"
    return InputError(reason, remedy, field="target", value=target.text)


def settle(
    job: Job, checkpoint: Checkpoint, work: pathlib.Path, stopwatch: Stopwatch = time_models
) -> tuple[Job, dict[str, Any] | None]:
    """Put the sparsity that meets a job's target into its request.

    An unfinished run keeps the sparsity that it began with: a latency that is measured again is
    never quite the same.

    Args:
      job: The run.
      checkpoint: The dense model.
      work: Directory of the unfinished run.
      stopwatch: Times models, for a target of latency.

    Returns:
      The job, and the beginning of the report's `target`; None without a target.

    Raises:
      InputError: The target cannot be met.
    """
    target = job.target
    if target is None:
        return job, None
    storage = Storage(stored_dtype(job.sources.dtype, checkpoint), job.output.pack)
    subject = Subject(checkpoint.config, job.method, job.request, job.output.layout)

    def decide() -> dict[str, Any]:
        key = [target.text, job.config.method, job.output.layout, *storage, checkpoint.config]
        path = work / FILE
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                return known["record"]
        record = resolve_target(subject, target, storage, job.config.method, stopwatch)
        if not (work / JOURNAL).exists():
            work.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps({"key": key, "record": record}).encode())
        return record

    record = run_on_primary(decide)
    console.show_search(record)
    request = dataclasses.replace(job.request, sparsity=record["sparsity"])
    return dataclasses.replace(job, request=request), record
