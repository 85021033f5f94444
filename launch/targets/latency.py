"""Predict a pruned model's latency from a measured table of block shapes.

A model's time is that of its embedding and head, and of its blocks. Short models of random weights
are timed: without blocks, with dense blocks, and with narrower ones. What lies between two measured
widths is interpolated. A block's attention and feed-forward parts run after each other, so what
they save adds up.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks.speed_programs import Times, compiled
from launch.benchmarks.timing import in_turn
from launch.targets.shapes import Subject, Written
from launch.targets.syntax import Phase, Target
from models.arch import Model
from models.checkpoint.output_format import Shape, shape_of
from models.errors import InputError
from models.families import hf
from models.surgery import cut, keep_experts

RUNS = 7
DECODED = 16  # timed tokens behind a prompt, of which one's time is reported
# Shares of a block's units that are timed.
SHARES = (0.75, 0.5, 0.25, 0.0625)
# Bytes of the timed blocks together: more than a processor's cache, so that they come from memory
# as those of a whole model do.
BLOCK_BYTES = 128 << 20
FEWEST_BLOCKS = 2
DENSE, OUTSIDE = "dense", "without blocks"
AXES = ("heads", "neurons", "experts")


class Workload(NamedTuple):
    """Work whose latency is bounded.

    Attributes:
      phase: "decode" for one new token, "prefill" for a whole prompt.
      batch: Texts at a time.
      length: Tokens of each prompt.
      dtype: Name of the type of the weights.
    """

    phase: Phase
    batch: int
    length: int
    dtype: str


# (models by name, work) -> seconds of each run by name, runs in turn.
Stopwatch = Callable[[Mapping[str, Model], Workload], Mapping[str, Sequence[float]]]


def time_models(models: Mapping[str, Model], work: Workload) -> dict[str, list[float]]:
    """Time models with the programs of `launch.bench --what=speed`, in turn.

    Args:
      models: Models in memory by name.
      work: The work.

    Returns:
      Seconds of each run by name, of one new token or of a prompt.
    """
    new_tokens = DECODED + 1 if work.phase == "decode" else 1
    programs: dict[str, Callable[[], Times]] = {}
    for name, model in models.items():
        programs[name], _ = compiled(model, work.batch, work.length, new_tokens)
        programs[name]()  # the first run is slower
    runs = in_turn(programs, RUNS)
    if work.phase == "decode":
        return {name: [t.generation / DECODED for t in own] for name, own in runs.items()}
    return {name: [t.prompt for t in own] for name, own in runs.items()}


def steady(runs: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """Return the seconds of each program, taken against a base that ran beside it.

    Args:
      runs: Seconds of each run by name.
      base: Name of the program that the others are compared with.

    Returns:
      Median over the runs of the ratio to the base, times the median of the base. A machine whose
      speed drifts changes both runs of a pair.
    """
    typical = statistics.median(runs[base])
    return {
        name: typical * statistics.median(a / b for a, b in zip(own, runs[base], strict=True))
        for name, own in runs.items()
    }


class Curve(NamedTuple):
    """Seconds of a block against the number of its units of one kind.

    Attributes:
      units: Numbers of units, rising.
      seconds: Seconds of a block that has so many, not falling.
    """

    units: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, units: int) -> float:
        """Return the seconds of a block with a number of units."""
        return float(np.interp(units, self.units, self.seconds))


class BlockTimes(NamedTuple):
    """Seconds of blocks of one kind, with experts or without.

    Attributes:
      shape: Units of the dense block.
      depth: Number of blocks that were timed together.
      dense: Seconds of a dense block.
      curves: By "heads", "neurons" and "experts": seconds of a block with fewer.
    """

    shape: Shape
    depth: int
    dense: float
    curves: Mapping[str, Curve]

    def at(self, shape: Shape) -> float:
        """Return the seconds of a block of a shape."""
        saved = (self.dense - c.at(getattr(shape, axis)) for axis, c in self.curves.items())
        return max(self.dense - sum(saved), 0.0)


class LatencyTable(NamedTuple):
    """Measured seconds of the parts of a model.

    Attributes:
      outside: Seconds of what is not in a block.
      blocks: Times of blocks with experts (True) and without (False), of each kind there is.
    """

    outside: float
    blocks: Mapping[bool, BlockTimes]

    def seconds(self, written: Written) -> float:
        """Return the predicted seconds of a model.

        Args:
          written: The model on shapes.
        """
        return self.outside + sum(
            self.blocks[shape.experts > 0].at(shape) for shape in shapes_of(written)
        )

    def to_json(self, device: str) -> dict[str, Any]:
        """Return the table for the report.

        Args:
          device: Name of the device.
        """
        blocks = [
            {
                "shape": list(times.shape),
                "timed_together": times.depth,
                "dense_seconds": times.dense,
                "curves": {axis: curve._asdict() for axis, curve in times.curves.items()},
            }
            for times in self.blocks.values()
        ]
        return {"device": device, "outside_seconds": self.outside, "blocks": blocks}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> "LatencyTable":
        """Return the table that `to_json` wrote.

        Args:
          table: The report's table.
        """
        blocks = {}
        for block in table["blocks"]:
            curves = {axis: Curve(**curve) for axis, curve in block["curves"].items()}
            shape = Shape(*block["shape"])
            times = BlockTimes(shape, block["timed_together"], block["dense_seconds"], curves)
            blocks[shape.experts > 0] = times
        return LatencyTable(table["outside_seconds"], blocks)


def shapes_of(written: Written) -> list[Shape]:
    """Return the units of each block of a checkpoint on shapes."""
    arch = hf.specs(written.config)[0]
    return [shape_of(arch, block) for block in written.blocks]


def changed_axes(subject: Subject, sparsity: float) -> list[str]:
    """Return the kinds of units of which a method leaves a block fewer.

    Args:
      subject: The model and the method.
      sparsity: Sparsity at which it removes some.
    """
    dense, pruned = shapes_of(subject.dense), shapes_of(subject.at(sparsity))
    return [
        axis
        for axis in AXES
        if {getattr(s, axis) for s in pruned} - {getattr(s, axis) for s in dense}
    ]


def check_positions(target: Target, written: Written) -> None:
    """Check that a model with learned positions can read the texts of a target.

    Args:
      target: Target of latency.
      written: The dense model.

    Raises:
      InputError: It has too few positions.
    """
    positions = getattr(hf.specs(written.config)[0].config, "positions", None)
    room = None if positions is None else positions - DECODED - 1
    if room is not None and target.length > room:
        raise InputError(
            f"has texts of {target.length} tokens and some new ones, the model has {positions} "
            "positions",
            f"give at most {room} tokens",
            field="target",
            value=target.text,
        )


def measure_table(
    dense: Written, axes: Sequence[str], work: Workload, stopwatch: Stopwatch = time_models
) -> LatencyTable:
    """Time blocks of a few shapes.

    Args:
      dense: The dense model.
      axes: Kinds of units of which blocks may have fewer.
      work: The work.
      stopwatch: Times models.
    """
    arch = hf.specs(dense.config)[0]
    dtype = jnp.dtype(work.dtype)
    shapes = shapes_of(dense)
    non_block = _random(dense.non_block, dtype, 0)
    models = {OUTSIDE: Model(arch, non_block, ())}
    points: dict[bool, dict[str, dict[int, str]]] = {}
    references, depths = {}, {}
    for kind in sorted({s.experts > 0 for s in shapes}):
        own = [i for i, s in enumerate(shapes) if (s.experts > 0) == kind]
        widest = Shape(*map(max, zip(*(shapes[i] for i in own), strict=True)))
        whole = [i for i in own if shapes[i] == widest] or own
        specs = [dense.blocks[i] for i in whole]
        specs = specs[: _depth(specs[0], dtype)]
        references[kind], depths[kind] = shapes[whole[0]], len(specs)
        blocks = tuple(_random(spec, dtype, 1 + i) for i, spec in enumerate(specs))
        label = "with experts, " if kind else ""
        models[label + DENSE] = Model(arch, non_block, blocks)
        points[kind] = {}
        for axis in axes:
            full = getattr(references[kind], axis)
            names = {full: label + DENSE}
            for count in sorted({max(1, round(share * full)) for share in SHARES} - {full}):
                if full:
                    names[count] = f"{label}{count} {axis}"
                    narrow = tuple(_narrowed(arch, b, axis, count) for b in blocks)
                    models[names[count]] = Model(arch, non_block, narrow)
            points[kind][axis] = names
    base = next(name for name in models if name.endswith(DENSE))
    seconds = steady(stopwatch(models, work), base)
    return _table(seconds, points, references, depths)


def _table(
    seconds: Mapping[str, float],
    points: Mapping[bool, Mapping[str, Mapping[int, str]]],
    references: Mapping[bool, Shape],
    depths: Mapping[bool, int],
) -> LatencyTable:
    """Return the table of measured seconds; `points` names a model by kind, axis and units."""
    outside = seconds[OUTSIDE]
    blocks = {}
    for kind, by_axis in points.items():

        def of_block(name: str, depth: int = depths[kind]) -> float:
            return max(seconds[name] - outside, 0.0) / depth

        dense = of_block(("with experts, " if kind else "") + DENSE)
        curves = {}
        for axis, names in by_axis.items():
            units = sorted(names)
            # More units never take less time: what says so is noise.
            rising = np.maximum.accumulate([min(of_block(names[u]), dense) for u in units])
            curves[axis] = Curve(tuple(units), tuple(map(float, rising)))
        blocks[kind] = BlockTimes(references[kind], depths[kind], dense, curves)
    return LatencyTable(outside, blocks)


def _depth(spec: Any, dtype: jnp.dtype) -> int:
    """Return the number of blocks to time together."""
    leaves = jax.tree.leaves(spec, is_leaf=hf.is_spec)
    size = sum(math.prod(leaf.shape) for leaf in leaves) * dtype.itemsize
    return max(FEWEST_BLOCKS, math.ceil(BLOCK_BYTES / size))


def _random(specs: Any, dtype: jnp.dtype, seed: int) -> Any:
    """Return small random parameters for a tree of specs: values do not affect the time."""
    leaves, structure = jax.tree.flatten(specs, is_leaf=hf.is_spec)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        0.02 * jax.random.normal(k, s.shape, dtype) for k, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def _narrowed(arch: Any, block: Any, axis: str, count: int) -> Any:
    """Return a block with its first units of a kind alone."""
    if axis == "experts":
        return keep_experts(block, np.arange(len(block.experts)) < count)
    for group in arch.groups_of(block, axis):
        size = getattr(shape_of(arch, block), axis)
        block = cut(block, group, np.arange(size) < count)
    return block
