"""Repair what is left of a model whose blocks were removed, beside the dense model."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from calibration.passes import BlockResult, overflow, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block
from models.checkpoint.blocks import prefetch
from models.errors import InputError
from models.merging import why_not_mergeable
from models.programs import program
from models.sharding import to_host
from pruning.structured.depth_cuts import Cut, Remains, cuts_of
from pruning.structured.depth_streams import (
    add_ratios,
    advance_both,
    advance_dense,
    advance_pruned,
    fit_before_cut,
    run_all,
    scale_pruned,
)
from pruning.structured.flatten import Flattener
from pruning.types import BlockSink

Repair = Literal["none", "scale", "refit", "scale+refit", "flatten"]


def default_repair(arch: Arch) -> Repair:
    """Return the repair of the corrected variant.

    Args:
      arch: Architecture.
    """
    # Outputs of several linears add up before a cut where there are experts.
    if arch.outputs_add and not arch.has_experts:
        return "refit"
    return "scale" if arch.rescale else "none"


def check_repair(arch: Arch, repair: Repair) -> None:
    """Raise InputError for a repair that has no exact form in an architecture.

    Args:
      arch: Architecture.
      repair: What is asked for.
    """
    reason = ""
    if "refit" in repair and not arch.outputs_add:
        reason = "fits the last linear before a cut, and here a norm follows it"
    elif "refit" in repair and arch.has_experts:
        reason = "fits the last linear before a cut, and experts have one each"
    elif "scale" in repair and not arch.rescale:
        reason = "needs a final norm and blocks that only add to the residual stream"
    elif repair == "flatten" and why_not_mergeable(arch):
        reason = f"merges blocks, and here {why_not_mergeable(arch)}"
    if reason:
        raise InputError(
            f"of sleb {reason}",
            f'give repair="{default_repair(arch)}"',
            field="repair",
            value=repair,
        )


@program("block rescaled", static=(0,))
def _rescale(
    function: Callable[[Block, jax.Array], Block], block: Block, scale: jax.Array
) -> Block:
    """Return the block for a stream of another scale, `Arch.rescale`."""
    return function(block, scale)


def _scale(xs: States, i: int) -> float:
    """Scale the pruned model's states to the dense one's at a cut behind block i."""
    total: Any = np.zeros(2, np.float32)
    for x in xs:
        total = add_ratios(x, total)
    ratios, tokens = to_host(total)
    factor = float(ratios / tokens)
    if not math.isfinite(factor) or not factor:
        raise overflow(i)
    for j, x in enumerate(xs):
        xs[j] = scale_pruned(x, np.float32(factor))
    return factor


class _Repairer:
    """A visitor of the dense blocks that hands on the repaired ones.

    Args:
      remains: What stays of the model.
      cuts: Cuts to repair, in order; at least one.
      repair: Kind of repair.
      runtime: How to execute.
      sink: Takes the finished blocks in order.

    Attributes:
      records: Of every dense block: figures of the cut that ends there, or None.
    """

    def __init__(
        self,
        remains: Remains,
        cuts: Sequence[Cut],
        repair: Repair,
        runtime: Runtime,
        sink: BlockSink,
    ) -> None:
        self.records: list[dict[str, Any] | None] = []
        self._remains, self._repair, self._mesh = remains, repair, runtime.mesh
        self._arch: Arch = remains.model.arch
        self._sink = sink
        self._before = {remains.path[cut.piece].block: cut for cut in cuts if cut.linear}
        self._ends = {cut.end - 1: cut for cut in cuts}
        self._index = {piece.block: k for k, piece in enumerate(remains.path)}
        # Up to the first of these dense blocks both models are equal; behind the last one's cut
        # nothing is repaired.
        changed = [i for i in range(len(remains.model.blocks)) if i not in self._index]
        self._first = min([*changed, *self._before])
        self._last = max(self._ends)
        self._held: dict[int, Block] = {}

    def _hand_on(self, index: int, block: Block) -> None:
        """Give a finished block to the sink, for the stream as the file will have it."""
        factors = [record["factor"] for record in self.records if record and "factor" in record]
        scale = math.prod(factors)
        if factors:
            # The stream before a cut stays as it is, and all that is added behind it is divided.
            block = _rescale(self._arch.rescale, block, np.float32(1 / scale))
        self._sink(index, block)

    def _mend(self, cut: Cut, xs: States, i: int) -> dict[str, Any]:
        """Repair a cut that ends behind dense block i, and return its figures."""
        record: dict[str, Any] = {"behind": None}
        if cut.linear:
            before = self._remains.path[cut.piece].block
            record = {"behind": before, "linear": cut.linear}
            # A run that goes on behind the block reads it again.
            held = self._held.pop(before, None)
            dense = held or next(prefetch(self._remains.model.blocks, [before], self._mesh))
            block = self._remains.finished(cut.piece, dense)
            if "refit" in self._repair:
                block, figures = fit_before_cut(self._arch, cut.linear, block, xs, before)
                record |= figures
            self._hand_on(cut.piece, block)
            if "scale" in self._repair or i != self._last:
                run_all(advance_pruned, self._arch, block, xs)
        if "scale" in self._repair:
            record["factor"] = _scale(xs, i)
        return record

    def visit(self, i: int, block: Block, xs: States, last: bool) -> BlockResult:
        """Run both models up to behind dense block i.

        Args:
          i: Index of the block.
          block: The dense block.
          xs: States of both models, by micro-batch.
          last: Whether it is the last block.
        """
        if i <= self._last:
            step = advance_both if i < self._first else advance_dense
            run_all(step, self._arch, block, xs)
        if i in self._before:
            self._held[i] = block
        elif i in self._index:
            new = self._remains.finished(self._index[i], block)
            self._hand_on(self._index[i], new)
            if self._first < i < self._last:
                run_all(advance_pruned, self._arch, new, xs)
        record = self._mend(self._ends[i], xs, i) if i in self._ends else None
        return BlockResult(block, record, propagated=True)


def repair_and_write(
    remains: Remains, tokens: np.ndarray, runtime: Runtime, sink: BlockSink, repair: Repair
) -> dict[str, Any]:
    """Hand the blocks that stay to the sink, repaired.

    Args:
      remains: What stays of the model.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.
      sink: Takes the finished blocks in order.
      repair: Kind of repair.

    Returns:
      Details for the report: `repair`, and `cuts`, the figures of each place that was repaired.
    """
    # Before a cut at the start there is no linear to fit.
    cuts = [cut for cut in cuts_of(remains) if cut.linear or "scale" in repair]
    if repair == "none" or not cuts:
        for index, piece in enumerate(remains.path):
            sink(index, remains.finished(index, remains.model.blocks[piece.block]))
        return {"repair": repair, "cuts": []}
    repairer: _Repairer | Flattener
    if repair == "flatten":
        repairer = Flattener(remains, cuts, runtime, sink)
    else:
        repairer = _Repairer(remains, cuts, repair, runtime, sink)
    visit_blocks(
        remains.model,
        np.repeat(tokens, 2, axis=0),
        dataclasses.replace(runtime, batch=2 * runtime.batch),
        repairer.visit,
        name="repairing cuts",
        records=repairer.records,
    )
    return {"repair": repair, "cuts": [record for record in repairer.records if record]}
