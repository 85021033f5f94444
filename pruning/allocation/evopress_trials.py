"""Trials of EvoPress: every linear pruned once at each level, and the divergence of their mixes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from calibration.states import Kept, Offload, fetch, keep, scratch
from models.arch import Block, Model, linear_of
from models.sharding import place
from pruning.allocation.evopress_core import Unit
from pruning.allocation.mix_trials import MixTrials, all_levels
from pruning.allocation.neuroal_trials import pruned_blocks
from pruning.budget import Shapes
from pruning.budget_core import fraction_for_count
from pruning.types import Layerwise
from pruning.weights.per_linear import counts_for, every_tap, prepare_tap, watched, with_weights

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


class Trials(MixTrials):
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
        super().__init__(model, tokens, samples, runtime, units)
        self._layerwise, self._shapes, self._counts = layerwise, shapes, counts
        self._levels = all_levels(units)

    @functools.cached_property
    def _memory(self) -> Offload:
        """Return the memory with room for the linears of all levels."""
        weights = sum(out * inputs for block in self._shapes for out, inputs in block.values())
        return self._memory_for(len(self._levels) * weights)

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

    def _mixed(self, i: int, block: Block, levels: Sequence[int]) -> Block:
        """Return a block with the linears of the units' levels."""
        kept = {
            slot: self._pruned[i][slot][levels[k] - self._levels.start]
            for k in self._of_block[i]
            for slot in self._units[k].steps
        }
        ws = {slot: fetch(w) for slot, w in kept.items()}
        return with_weights(block, place(ws, self._runtime.mesh))
