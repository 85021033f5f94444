"""Trials of widths: the readers of every level fitted once, and the divergence of their mixes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.runtime import Runtime
from calibration.states import Kept, Offload, fetch, keep, scratch
from models.arch import Block, Model, linear_of, with_linears
from models.layers import Linear
from models.sharding import place
from models.surgery import mask
from pruning.allocation.evopress_core import Unit
from pruning.allocation.mix_trials import MixTrials
from pruning.allocation.width_core import moved
from pruning.budget import all_shapes
from pruning.structured.remove import (
    REPAIR_OBSERVERS,
    Keep,
    Mean,
    calibrate_readers,
    repair_readers,
)
from pruning.structured.widths import Selection


class _Level(NamedTuple):
    """A part of a block at one width.

    Attributes:
      stays: Group -> the units that stay.
      readers: Group -> its fitted reader's matrix, zero where it read what went [out in].
      biases: Group -> the reader's bias [out], or None.
    """

    stays: Keep
    readers: Mapping[str, Kept]
    biases: Mapping[str, Any]


class WidthTrials(MixTrials):
    """The readers of every level, and the windows that mixes of widths are tried on.

    A part at a level is the dense block's with zeros in the columns that read what went, so all
    trials of a block share one compilation.
    """

    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        samples: int,
        runtime: Runtime,
        selection: Selection,
        units: Sequence[Unit],
    ) -> None:
        """Keep what trials need; nothing is computed before the first of them.

        Args:
          model: The dense model.
          tokens: Calibration windows, int [samples length]; readers are fitted to all of them.
          samples: Windows that mixes are tried on, the first of them.
          runtime: How to execute.
          selection: Units of level 0, and the repair of their readers.
          units: Parts of blocks with a level each.
        """
        super().__init__(model, tokens, samples, runtime, units)
        self._selection, self._directory = selection, scratch(self)

    @functools.cached_property
    def _memory(self) -> Offload:
        """Return the memory with room for the readers of all levels."""
        arch = self._model.arch
        readers = {group.reader.name for group in arch.groups}
        sizes = [
            sum(out * inputs for slot, (out, inputs) in block.items() if slot in readers)
            for block in all_shapes(self._model)
        ]
        most = max(u.high - u.low + 1 for u in self._units)
        return self._memory_for(most * sum(sizes))

    @functools.cached_property
    def _fitted(self) -> dict[tuple[int, int], _Level]:
        """Return every part at every level, by (index of the unit, level).

        They are fitted as in a run at level 0: each block sees the outputs of those before it.
        """
        selection = self._selection
        found: dict[tuple[int, int], _Level] = {}

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            if selection.means is not None:
                stats = {tap: Mean(mean) for tap, mean in selection.means[i].items()}
            for k in self._of_block[i]:
                unit = self._units[k]
                for level in range(unit.low, unit.high + 1):
                    found[k, level] = self._fit(block, stats, k, level)
            own = [found[k, 0] for k in self._of_block[i]]
            return self._stitched(block, own), None

        observer = None if selection.means is not None else REPAIR_OBSERVERS[selection.repair]
        calibrate_readers(
            self._model,
            self._tokens,
            self._runtime,
            visit,
            observer,
            "pruned",
            "fitting every width",
        )
        return found

    def _fit(self, block: Block, stats: Mapping[str, Any], k: int, level: int) -> _Level:
        """Return a part at a level."""
        arch, unit = self._model.arch, self._units[k]
        (kind, more), *_ = moved(unit, level).items()
        stays = self._selection.parts[unit.block][kind].widened(more).keep()
        new = repair_readers(arch, block, stats, stays, self._selection.repair)
        readers, biases = {}, {}
        for group, units in stays.items():
            new = mask(new, arch.group(group), units)
            linear = linear_of(new, arch.group(group).reader.name)
            file = self._directory / f"{k}-{level}-{group}.npy"
            readers[group], biases[group] = keep(linear.w, self._memory, file), linear.b
        return _Level(stays, readers, biases)

    def _stitched(self, block: Block, levels: Sequence[_Level]) -> Block:
        """Return a dense block with its parts at these levels."""
        arch = self._model.arch
        for level in levels:
            linears = {}
            for group, kept in level.readers.items():
                w = place(fetch(kept), self._runtime.mesh)
                linears[arch.group(group).reader.name] = Linear(w, level.biases[group])
            block = with_linears(block, linears)
            for group, units in level.stays.items():
                # Zeros in the reader suffice, but for norms over all units.
                if arch.group(group).norms:
                    block = mask(block, arch.group(group), units)
        return block

    def _mixed(self, i: int, block: Block, levels: Sequence[int]) -> Block:
        """Return a block whose parts have the units' levels."""
        return self._stitched(block, [self._fitted[k, levels[k]] for k in self._of_block[i]])
