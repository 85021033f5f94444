"""Find what a method must remove to meet a target, before any calibration."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calibration.journal import StepCache
from launch.report import console
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
from launch.targets.search import PROBES, Search, search
from launch.targets.shapes import Subject, Written
from launch.targets.sizes import Storage, size_of
from launch.targets.syntax import Target
from models.errors import InputError


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


class Aim:
    """A target for one model and method: finds the sparsity, and again once units are scored.

    Args:
      subject: The model on shapes and the method.
      target: The target.
      storage: How the weights are stored.
      name: The method as the user wrote it.
      table: Measured seconds by block shape, for a target of latency.

    Attributes:
      record: The report's `target`, so far: what was asked and predicted, the `sparsity` to ask of
        the method, and what was tried.
    """

    def __init__(
        self,
        subject: Subject,
        target: Target,
        storage: Storage,
        name: str,
        table: LatencyTable | None,
    ) -> None:
        self.record: dict[str, Any] = {}
        self._subject, self._target, self._storage = subject, target, storage
        self._name, self._table = name, table

    def resolve(self) -> dict[str, Any]:
        """Find the smallest sparsity that meets the target as far as shapes tell.

        Returns:
          The record.

        Raises:
          InputError: The dense model meets the target already, or no sparsity does.
        """
        target = self._target
        dense = self._cost(self._subject.dense)
        if dense <= target.limit:
            raise InputError(
                f"is met by the dense model, which has {target.show(dense)}",
                "ask for less",
                field="target",
                value=target.text,
            )
        self.record = {
            "target": target.text,
            "kind": target.kind,
            "texts": target.workload,
            **self._storage._asdict(),
            "asked": target.amount,
            "dense": target.value(dense),
            **self._find(self._subject.at),
        }
        if self._table:
            self.record["table"] = self._table.to_json(jax.devices()[0].device_kind)
        return self.record

    def __call__(self, choose: Callable[[float], Sequence[Mapping[str, np.ndarray]]]) -> float:
        """Return the sparsity that meets the target with the units that a method has scored.

        Args:
          choose: Sparsity -> units that stay, bool [units] by block and group.

        Raises:
          InputError: No sparsity meets it.
        """
        found = self._find(lambda sparsity: self._subject.with_units(choose(sparsity)))
        # Of several calibration draws the first is written.
        if "first" not in self.record:
            first = {key: self.record[key] for key in found}
            self.record |= {**found, "first": first}
        return found["sparsity"]

    def _cost(self, written: Written) -> float:
        """Return the cost of a checkpoint on shapes."""
        if self._table:
            return self._table.seconds(written) / self._table.seconds(self._subject.dense)
        return size_of(self._target, written, self._storage)

    def _find(self, write: Callable[[float], Written]) -> dict[str, Any]:
        """Search among what is written at each sparsity; return the part of the record."""
        target, subject = self._target, self._subject
        shapes: dict[float, str] = {}

        def cost(sparsity: float) -> float:
            # At 0 some methods would still repair.
            written = write(sparsity) if sparsity else subject.dense
            shapes[sparsity] = describe_shape(written)
            return self._cost(written)

        found = search(cost, subject.accepts, target.limit, _resolution(subject))
        if found.sparsity is None:
            raise _impossible(target, self._name, found, cost(0.0), self._storage)
        return {
            "sparsity": found.sparsity,
            "shape": shapes[found.sparsity],
            "predicted": target.value(found.cost),
            "tried": [
                {"sparsity": s, "shape": shapes[s], "value": target.value(c)}
                for s, c in found.tried
            ],
        }


def aim_at(
    subject: Subject,
    target: Target,
    storage: Storage,
    name: str,
    stopwatch: Stopwatch = time_models,
    cache: StepCache | None = None,
) -> Aim:
    """Return the aim of a target; for one of latency, time blocks of a few shapes.

    Args:
      subject: The model on shapes and the method.
      target: The target.
      storage: How the weights are stored.
      name: The method as the user wrote it.
      stopwatch: Times models, for a target of latency.
      cache: Keeps measured times for the other runs of this process.

    Raises:
      InputError: The method changes no shape, so no latency; or the model has too few positions.
    """
    if target.kind != "latency":
        return Aim(subject, target, storage, name, None)
    check_positions(target, subject.dense)
    probe = next((s for s in PROBES if subject.accepts(s)), 0.0)
    if shapes_of(subject.at(probe)) == shapes_of(subject.dense):
        raise _impossible(target, name, Search(None, 1.0, (), 0.0), 1.0, storage)
    work = Workload(target.phase, target.batch, target.length, storage.dtype)
    axes = changed_axes(subject, probe)

    def measure() -> LatencyTable:
        console.note(f"target {target.text}: timing blocks of a few shapes on this device")
        return measure_table(subject.dense, axes, work, stopwatch)

    key = ("block times", json.dumps(subject.config, sort_keys=True), tuple(axes), work)
    table = (cache or StepCache()).get_or_compute(key, measure)
    return Aim(subject, target, storage, name, table)


def _resolution(subject: Subject) -> float:
    """Return a sparsity below that of any single unit of the model."""
    shapes = shapes_of(subject.dense)
    units = sum(s.heads + s.neurons * max(s.experts, 1) + s.experts for s in shapes)
    return 1 / (4 * (units + max(map(max, subject.dense.linears.values()))))


def _impossible(
    target: Target, name: str, found: Search, dense: float, storage: Storage
) -> InputError:
    """Return the error for a target that no sparsity meets."""
    nearest = f"the nearest possible is {target.reachable(found.cost)}"
    if found.cost < dense:
        reason = f"is out of reach of {name}, and {nearest}"
        remedy = "ask for that, or choose another method"
    else:
        reason = f"is out of reach of {name}, whose zeros stay in place, and {nearest}, "
        reason += "the dense model's"
        remedy = "choose a method that removes units or blocks, such as flap, llmrank or sleb"
        if target.kind in ("params", "weights") and storage.pack == "none":
            remedy += ", or give `pack`=bitmask, which stores no zeros"
    return InputError(reason, remedy, field="target", value=target.text)
