"""Trials of EvoPress: every linear pruned once at each level, and the divergence of their mixes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calibration.passes import calibrate_blocks, micro_batches
from calibration.runtime import Runtime
from calibration.states import (
    Kept,
    Offload,
    States,
    available_memory,
    choose_offload,
    fetch,
    fits_in_memory,
    keep,
    scratch,
)
from models.arch import Block, Model, apply_block, embed, linear_of
from models.checkpoint.blocks import LazyBlocks, prefetch
from models.processes import is_multiprocess
from models.programs import Program
from models.sharding import place, split, to_host
from pruning.allocation.evopress_core import Unit, window_divergence
from pruning.allocation.neuroal_trials import pruned_blocks
from pruning.budget import Shapes
from pruning.budget_core import fraction_for_count
from pruning.types import Layerwise
from pruning.weights.per_linear import counts_for, every_tap, prepare_tap, watched, with_weights

_divergence = Program(window_divergence, "divergence from the dense model", static=(0,))

Counts = Sequence[Mapping[str, int]]  # by block: slot -> entries of each row


def fractions_at(
    unit: Unit, level: int, counts: Mapping[str, int], inputs: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Return the fraction to remove of a unit's slots at a level.

    Args:
      unit: The unit.
      level: Its level, within its bounds.
      counts: Slot -> entries of each row that level 0 removes.
      inputs: Slot -> inputs of a row.
    """
    return {
        slot: fraction_for_count(np.asarray(counts[slot] + level * n), inputs[slot])
        for slot, n in unit.steps.items()
    }


class Trials:
    """The pruned linears of every level, and the windows that their mixes are tried on."""

    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        samples: int,
        runtime: Runtime,
        layerwise: Layerwise,
        units: Sequence[Unit],
        shapes: Shapes,
        counts: Counts,
    ) -> None:
        """Keep what trials need; nothing is computed before the first of them.

        Args:
          model: The dense model.
          tokens: Calibration windows, int [samples length]; linears are pruned with all of them.
          samples: Windows that mixes are tried on, the first of them.
          runtime: How to execute.
          layerwise: What linears are pruned with.
          units: Units with a level each.
          shapes: Shapes of all slots, by block.
          counts: By block: slot -> entries of each row that level 0 removes.
        """
        # What is computed here belongs to the search's steps, which are saved whole.
        self._runtime = dataclasses.replace(runtime, journal=None)
        self._model, self._tokens, self._layerwise = model, tokens, layerwise
        self._searched = tokens[:samples]
        self._units, self._shapes, self._counts = units, shapes, counts
        self._of_block: list[list[int]] = [[] for _ in shapes]  # indices of a block's units
        for k, unit in enumerate(units):
            self._of_block[unit.block].append(k)
        self._levels = range(min(u.low for u in units), max(u.high for u in units) + 1)

    @property
    def windows(self) -> int:
        """Return the number of windows that mixes are tried on."""
        return len(self._searched)

    @functools.cached_property
    def _blocks(self) -> Sequence[Block]:
        """Return the dense blocks, on the devices where all of them fit."""
        blocks, mesh = self._model.blocks, self._runtime.mesh
        shards = mesh.shape["model"] if mesh else 1
        if isinstance(blocks, LazyBlocks) and not fits_in_memory(blocks.nbytes, shards):
            return blocks
        return list(prefetch(blocks, mesh=mesh))

    @functools.cached_property
    def _memory(self) -> Offload:
        """Return the memory with room for the linears of all levels."""
        if is_multiprocess():
            return "device"  # no process has a whole matrix
        weights = sum(out * inputs for block in self._shapes for out, inputs in block.values())
        dtype = jax.tree.leaves(self._model.non_block)[0].dtype
        size = len(self._levels) * weights * dtype.itemsize
        mesh = self._runtime.mesh
        shards = mesh.shape["model"] if mesh else 1
        return choose_offload(size // shards, size, available_memory())

    @functools.cached_property
    def _pruned(self) -> list[dict[str, list[Kept]]]:
        """Return the linears of all levels: by block, slot -> matrix [out in] by level.

        They are pruned as in a run at level 0: each block sees the outputs of those before it.
        """
        arch, (pruner, pattern) = self._model.arch, self._layerwise
        directory = scratch(self)
        found: list[dict[str, list[Kept]]] = []

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            reads = {s.reads for s in arch.slots_of(block)}
            prepared = {tap: prepare_tap(pruner, stats.get(tap), tap)[0] for tap in reads}
            own: dict[str, list[Kept]] = {slot: [] for slot in self._counts[i]}
            counts = [counts_for(arch, pattern, block, self._fractions(i, n)) for n in self._levels]
            at_zero = block
            for n, new in enumerate(pruned_blocks(arch, pruner, block, prepared, counts)):
                if self._levels[n] == 0:
                    at_zero = new
                for slot, kept in own.items():
                    file = directory / f"{i}-{slot}-{n}.npy"
                    kept.append(keep(linear_of(new, slot).w, self._memory, file))
            found.append(own)
            return at_zero, None

        calibrate_blocks(
            self._model,
            self._tokens,
            self._runtime,
            visit,
            watch=watched(every_tap(arch, pruner)),
            propagate="pruned",
            name="pruning at every level",
        )
        return found

    def _fractions(self, i: int, level: int) -> dict[str, np.ndarray]:
        """Return the fractions of a block's slots at a level, or at the nearest they can take."""
        fractions: dict[str, np.ndarray] = {}
        inputs = {slot: shape[1] for slot, shape in self._shapes[i].items()}
        for k in self._of_block[i]:
            unit = self._units[k]
            possible = min(max(level, unit.low), unit.high)
            fractions |= fractions_at(unit, possible, self._counts[i], inputs)
        return fractions

    @functools.cached_property
    def _dense(self) -> np.ndarray:
        """Return the hidden states after the last dense block, on the host [windows t d]."""
        arch, mesh = self._model.arch, self._runtime.mesh
        non_block = place(self._model.non_block, mesh)
        xs = self._embedded(self._searched, non_block)
        for block in prefetch(self._blocks, mesh=mesh):
            for j, x in enumerate(xs):
                xs[j] = apply_block(arch, block, x, name="dense block")
        return np.concatenate([to_host(x) for x in xs])

    def _embedded(self, tokens: np.ndarray, non_block: Any) -> States:
        """Return the hidden states before the first block."""
        runtime, arch = self._runtime, self._model.arch
        batches = micro_batches(tokens, runtime.batch, runtime.mesh)
        xs = (embed(arch, non_block, t) for t in batches)
        return States(xs, runtime.offload, runtime.mesh)

    def _mixed(self, i: int, block: Block, levels: Sequence[int]) -> Block:
        """Return a block with the linears of the units' levels."""
        kept = {
            slot: self._pruned[i][slot][levels[k] - self._levels.start]
            for k in self._of_block[i]
            for slot in self._units[k].steps
        }
        ws = {slot: fetch(w) for slot, w in kept.items()}
        return with_weights(block, place(ws, self._runtime.mesh))

    def divergences(self, mixes: Sequence[Sequence[int]], windows: Sequence[int]) -> list[float]:
        """Return the mean divergence of each mix from the dense model.

        Args:
          mixes: Level of each unit, for each mix.
          windows: Indices of the windows to try them on.
        """
        arch, runtime = self._model.arch, self._runtime
        non_block = place(self._model.non_block, runtime.mesh)
        first = self._embedded(self._searched[list(windows)], non_block)
        streams = [first.copy() for _ in mixes]
        for i, block in enumerate(prefetch(self._blocks, mesh=runtime.mesh)):
            for levels, xs in zip(mixes, streams, strict=True):
                mixed = self._mixed(i, block, levels)
                for j, x in enumerate(xs):
                    xs[j] = apply_block(arch, mixed, x, name="trial block")
        dense = self._dense[list(windows)]
        means = []
        for xs in streams:
            values = []
            for j, x in enumerate(xs):
                own = dense[j * runtime.batch : (j + 1) * runtime.batch]
                target = split(own, runtime.mesh, "sample")
                values.append(to_host(_divergence(arch.head, non_block, target, x)))
            mean = float(np.mean(np.concatenate(values)))
            means.append(mean if np.isfinite(mean) else np.inf)  # NaN would be the least
        return means
