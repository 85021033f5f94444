"""Repair what is left of a model whose blocks were removed, beside the dense model.

Both models run over the calibration windows together. Their hidden states lie in one array, a
window of the dense model before the same window of the pruned one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.passes import BlockResult, overflow, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block, Model, Taps
from models.checkpoint.blocks import prefetch
from models.programs import Program, program
from models.sharding import to_host
from pruning.structured.depth_repair_core import (
    CutStats,
    add_cut_stats,
    begin_cut_stats,
    refit_before_cut,
)
from pruning.structured.sleb_paths import Path, Piece
from pruning.structured.sleb_runner import silenced
from pruning.types import BlockSink

Forward = Callable[[Block, jax.Array], tuple[jax.Array, Taps]]  # `Arch.block`

_refit = Program(refit_before_cut, "linear before a cut fitted")


class Cut(NamedTuple):
    """A place in the pruned model behind which something is missing.

    Attributes:
      index: Number of the last piece before it in the pruned model.
      piece: That piece.
      end: Dense block whose input the stream should equal behind the cut; the number of blocks
        behind the last one.
      linear: Last linear that writes to the stream before the cut.
    """

    index: int
    piece: Piece
    end: int
    linear: str


def cuts_of(path: Path, depth: int, writers: Sequence[str]) -> list[Cut]:
    """Return the cuts of a path that have a piece before them, in order.

    Args:
      path: Pieces that stay.
      depth: Number of blocks of the dense model.
      writers: All linears of a block that write to the residual stream, in order.
    """
    ends = [*(piece.block for piece in path[1:]), depth]
    cuts = []
    for k, (piece, end) in enumerate(zip(path, ends, strict=True)):
        if piece.silent or end > piece.block + 1:
            # Behind the last writer nothing of the block reads the stream any more, so that its
            # output is linear in it.
            linear = [w for w in writers if w not in piece.silent][-1]
            cuts.append(Cut(k, piece, end, linear))
    return cuts


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the states of the dense and of the pruned model, both [b t d]."""
    # Neighbours in pairs, so that the devices that share the windows hold both of each.
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def _joined(dense: jax.Array, pruned: jax.Array) -> jax.Array:
    """Return the states of both models as one array [2b t d]."""
    return jnp.stack([dense, pruned], axis=1).reshape(-1, *dense.shape[1:])


@program("block of both models", static=(0,))
def _advance_both(function: Forward, block: Block, x: jax.Array) -> jax.Array:
    """Return the states behind a block of models that are equal up to there."""
    y = function(block, _halves(x)[0])[0]
    return _joined(y, y)


@program("block of the dense model", static=(0,))
def _advance_dense(function: Forward, block: Block, x: jax.Array) -> jax.Array:
    """Return the states with the dense model's behind a block."""
    dense, pruned = _halves(x)
    return _joined(function(block, dense)[0], pruned)


@program("block of the pruned model", static=(0,))
def _advance_pruned(function: Forward, block: Block, x: jax.Array) -> jax.Array:
    """Return the states with the pruned model's behind a block."""
    dense, pruned = _halves(x)
    return _joined(dense, function(block, pruned)[0])


@program("statistics of a cut begun", static=(0, 1))
def _begin(function: Forward, tap: str, block: Block, x: jax.Array) -> CutStats:
    """Return the sums over no tokens."""
    y, taps = jax.eval_shape(function, block, x)
    return begin_cut_stats(taps[tap].shape[-1], y.shape[-1])


# The old sums are donated: a Gram matrix of 70B's widths would lie in memory twice.
@program("statistics of a cut", static=(0, 1), donated=(4,))
def _observe(function: Forward, tap: str, block: Block, x: jax.Array, stats: CutStats) -> CutStats:
    """Run the pruned model's block and compare its output with the dense model's states."""
    target, inputs = _halves(x)
    y, taps = function(block, inputs)
    return add_cut_stats(stats, taps[tap], y, target)


def _run_all(step: Program, arch: Arch, block: Block, xs: States) -> None:
    """Replace the states of every micro-batch by those behind a block."""
    for j, x in enumerate(xs):
        xs[j] = step(arch.block, block, x)


def _fit(arch: Arch, cut: Cut, block: Block, xs: States) -> tuple[Block, dict[str, Any]]:
    """Return the block with its last linear fitted, and the figures of the fit."""
    tap = arch.tap(cut.linear)
    stats = _begin(arch.block, tap, block, xs[0])
    for x in xs:
        stats = _observe(arch.block, tap, block, x, stats)
    linear, errors = _refit(getattr(block, cut.linear), stats, np.float32(arch.branch_scale))
    before, after = (float(e) for e in to_host(errors))
    if not np.isfinite([before, after]).all():
        raise overflow(cut.piece.block)
    record = {
        "block": cut.piece.block,
        "linear": cut.linear,
        "error": [before, after],
    }
    return block.replace(**{cut.linear: linear}), record


def refit_blocks(
    model: Model,
    path: Path,
    tokens: np.ndarray,
    runtime: Runtime,
    sink: BlockSink,
    writers: Sequence[str],
    silent_linears: Mapping[Piece, Sequence[str]],
) -> list[dict[str, Any]]:
    """Fit the last linear before each cut to the dense stream behind it; hand on all blocks.

    Args:
      model: The dense model.
      path: Pieces that stay.
      tokens: Calibration windows, int [samples length].
      runtime: How to execute.
      sink: Takes the finished blocks in order.
      writers: All linears of a block that write to the residual stream, in order.
      silent_linears: Linears to zero, by piece.

    Returns:
      Figures of each cut: the block before it, the linear, and the error before and after.
    """
    arch, depth = model.arch, len(model.blocks)
    cuts = {cut.piece.block: cut for cut in cuts_of(path, depth, writers)}
    ends = {cut.end - 1: cut for cut in cuts.values()}
    index = {piece.block: k for k, piece in enumerate(path)}
    missing = [i for i in range(depth) if i not in index or i in cuts]
    first, last = missing[0], max(ends, default=-1)
    held: dict[int, Block] = {}

    def finished(i: int, block: Block) -> Block:
        return silenced(block, silent_linears[path[index[i]]])

    def repair(cut: Cut, xs: States) -> dict[str, Any]:
        i = cut.piece.block
        # A run that goes on behind the block reads it again.
        block = held.pop(i, None) or next(prefetch(model.blocks, [i], runtime.mesh))
        new, record = _fit(arch, cut, finished(i, block), xs)
        sink(cut.index, new)
        if cut.end <= last:
            _run_all(_advance_pruned, arch, new, xs)
        return record

    def visit(i: int, block: Block, xs: States, is_last: bool) -> BlockResult:
        record = None
        if i <= last:
            _run_all(_advance_both if i < first else _advance_dense, arch, block, xs)
        if i in cuts:
            held[i] = block
        elif i in index:
            new = finished(i, block)
            sink(index[i], new)
            if first < i < last:
                _run_all(_advance_pruned, arch, new, xs)
        if i in ends:
            record = repair(ends[i], xs)
        return BlockResult(block, record, propagated=True)

    records = visit_blocks(
        model,
        np.repeat(tokens, 2, axis=0),
        dataclasses.replace(runtime, batch=2 * runtime.batch),
        visit,
        name="fitting before cuts",
    )
    return [record for record in records if record is not None]
