"""FlattenGPT: merge removed blocks into the block before them, and cut that to its own width."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.passes import BlockResult
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block, Group
from models.checkpoint.blocks import prefetch
from models.merging import can_merge, merge
from models.programs import Program
from models.sharding import to_host
from models.surgery import cut, units
from pruning.structured.depth_cuts import Cut, Remains
from pruning.structured.depth_repair_core import CutStats
from pruning.structured.depth_streams import (
    advance_both,
    advance_dense,
    advance_pruned,
    begin_stats,
    cut_stats,
    fit_before_cut,
    fitted,
    observe_attention,
    run_all,
)
from pruning.structured.flatten_core import channel_power, leverage, without_channels
from pruning.structured.select_core import drop_lowest
from pruning.types import BlockSink

_channel_power = Program(channel_power, "scores of merged heads")
_leverage = Program(leverage, "scores of merged neurons")
_without_channels = Program(without_channels, "sums without dropped units")


class Merged(NamedTuple):
    """A block into which others were merged.

    Attributes:
      block: Parameters, as wide as before.
      origins: By group: the dense block that each unit is from, int [units].
    """

    block: Block
    origins: Mapping[str, np.ndarray]


def _attention_stats(arch: Arch, wide: Block, before: Block, added: Block, xs: States) -> CutStats:
    """Return the sums for the attention of a merged block and what it should add to the stream."""
    writer = arch.group("heads").reader.name
    tap = arch.tap(writer)
    stats: CutStats = begin_stats(arch.block, tap, wide, xs[0])
    scale = np.float32(arch.branch_scale)
    for x in xs:
        blocks = (wide, before, added)
        stats = observe_attention(arch.block, writer, tap, blocks, x, stats, scale)
    return stats


def _narrow(
    arch: Arch, group: Group, wide: Block, width: int, stats: CutStats, i: int
) -> tuple[Block, np.ndarray, dict[str, Any]]:
    """Cut a group of a merged block to a width and fit its reader.

    Args:
      arch: Architecture.
      group: The group.
      wide: The merged block.
      width: Units that stay.
      stats: Sums over tokens for the reader.
      i: Index of the block, for messages.

    Returns:
      The block, the units that stay, bool [units], and the figures of the fit.
    """
    reader = group.reader
    whole = getattr(wide, reader.name)
    of_heads = group.name == "heads"
    by_channel = _channel_power(stats, whole) if of_heads else _leverage(stats.gram)
    scores = to_host(by_channel).reshape(-1, reader.width).sum(axis=1)
    keep = drop_lowest(scores, len(scores) - width)
    kept = np.flatnonzero(np.repeat(keep, reader.width)).astype(np.int32)
    block = cut(wide, group, keep)
    left = _without_channels(stats, whole, kept, np.float32(arch.branch_scale))
    linear, figures = fitted(arch, getattr(block, reader.name), left, i)
    return block.replace(**{reader.name: linear}), keep, figures


class Flattener:
    """A visitor of the dense blocks that hands on those that stay, with the others merged in.

    Args:
      remains: What stays of the model.
      cuts: Cuts of the model, in order; at least one, and none at the start alone.
      runtime: How to execute.
      sink: Takes the finished blocks in order.

    Attributes:
      records: Of every dense block: figures of the blocks merged up to there, or None.
    """

    def __init__(
        self, remains: Remains, cuts: Sequence[Cut], runtime: Runtime, sink: BlockSink
    ) -> None:
        self.records: list[dict[str, Any] | None] = []
        self._model, self._mesh, self._sink = remains.model, runtime.mesh, sink
        self._arch: Arch = remains.model.arch
        self._index = {piece.block: k for k, piece in enumerate(remains.path)}
        self._runs = [range(remains.path[cut.piece].block, cut.end) for cut in cuts]
        # Up to here both models are equal, and behind the last run nothing is merged.
        self._first = min(i for i in range(len(remains.model.blocks)) if i not in self._index) - 1
        self._last = self._runs[-1][-1]

    def _add(
        self, merged: Merged, start: int, i: int, added: Block, xs: States
    ) -> tuple[Merged, dict[str, Any]]:
        """Merge dense block i into the block before it, and move the dense states behind it."""
        arch = self._arch
        heads, neurons = arch.group("heads"), arch.group("neurons")
        wide = merge(arch, merged.block, added)
        stats = _attention_stats(arch, wide, merged.block, added, xs)
        block, of_heads, _ = _narrow(arch, heads, wide, units(merged.block, heads), stats, start)
        run_all(advance_dense, arch, added, xs)
        stats = cut_stats(arch, neurons.reader.name, block, xs)
        width = units(merged.block, neurons)
        block, of_neurons, figures = _narrow(arch, neurons, block, width, stats, start)
        origins = {}
        for group, keep in ((heads, of_heads), (neurons, of_neurons)):
            own = merged.origins[group.name]
            origins[group.name] = np.append(own, np.full(units(added, group), i))[keep]
        return Merged(block, origins), figures

    def _flatten(self, run: range, last: Block, xs: States) -> dict[str, Any]:
        """Merge the blocks of a run into its first, hand it on, and return the figures.

        Args:
          run: Dense blocks, the first of which stays.
          last: The last one's parameters.
          xs: States of both models before the first one, which become those behind the last.
        """
        arch, start = self._arch, run[0]
        # One block is merged after the other, so that only two are in memory.
        read = itertools.chain(prefetch(self._model.blocks, run[:-1], self._mesh), (last,))
        first = next(read)
        groups = ("heads", "neurons")
        merged = Merged(first, {g: np.full(units(first, arch.group(g)), start) for g in groups})
        run_all(advance_dense, arch, first, xs)
        linear = arch.group("neurons").reader.name
        record: dict[str, Any] = {"behind": start, "linear": linear, "merged": []}
        for i, added in zip(run[1:], read, strict=True):
            if can_merge(arch, start, i):
                merged, figures = self._add(merged, start, i, added, xs)
                record |= {**figures, "merged": [*record["merged"], i]}
            else:
                run_all(advance_dense, arch, added, xs)
        block = merged.block
        if not can_merge(arch, start, run[-1]):
            # What was not merged is made up for as by the plain refit.
            block, figures = fit_before_cut(arch, linear, block, xs, start)
            record |= figures
        for name, origins in merged.origins.items():
            record[f"{name}_from"] = [int((origins == i).sum()) for i in (start, *record["merged"])]
        self._sink(self._index[start], block)
        if run[-1] < self._last:
            run_all(advance_pruned, arch, block, xs)
        return record

    def visit(self, i: int, block: Block, xs: States, last: bool) -> BlockResult:
        """Run both models up to behind dense block i, or to the run that it belongs to.

        Args:
          i: Index of the block.
          block: The dense block.
          xs: States of both models, by micro-batch.
          last: Whether it is the last block.
        """
        run = next((run for run in self._runs if i in run), None)
        record = None
        if run is not None:
            # States stay those before the run until its last block: a run that was killed goes on
            # from there.
            if i == run[-1]:
                record = self._flatten(run, block, xs)
        elif i not in self._index:
            run_all(advance_dense, self._arch, block, xs)
        else:
            self._sink(self._index[i], block)
            if i < self._first:
                run_all(advance_both, self._arch, block, xs)
            elif i < self._last:
                run_all(advance_dense, self._arch, block, xs)
                run_all(advance_pruned, self._arch, block, xs)
        return BlockResult(block, record, propagated=True)
