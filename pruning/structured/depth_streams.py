"""Hidden states of the dense and of a pruned model over the same calibration windows.

They lie in one array, each window of the dense model before the same window of the pruned one, so
that passes over blocks keep and save them like those of one model.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibration.passes import overflow
from calibration.states import States
from models.arch import Arch, Block, Taps
from models.layers import Linear
from models.programs import Program, program
from models.sharding import to_host
from pruning.structured.depth_repair_core import (
    CutStats,
    add_cut_stats,
    begin_cut_stats,
    refit_before_cut,
    sum_of_ratios,
)

_refit = Program(refit_before_cut, "linear before a cut fitted")

Forward = Callable[[Block, jax.Array], tuple[jax.Array, Taps]]  # `Arch.block`


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the states of the dense and of the pruned model, both [b t d]."""
    # Neighbours in pairs, so that the devices that share the windows hold both of each.
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def joined(dense: jax.Array, pruned: jax.Array) -> jax.Array:
    """Return the states of both models as one array [2b t d]."""
    return jnp.stack([dense, pruned], axis=1).reshape(-1, *dense.shape[1:])


@program("block of both models", static=(0,))
def advance_both(function: Forward, block: Block, x: jax.Array) -> jax.Array:
    """Return the states behind a block of models that are equal up to there."""
    y = function(block, halves(x)[0])[0]
    return joined(y, y)


@program("block of the dense model", static=(0,))
def advance_dense(function: Forward, block: Block, x: jax.Array) -> jax.Array:
    """Return the states with the dense model's behind a block."""
    dense, pruned = halves(x)
    return joined(function(block, dense)[0], pruned)


@program("block of the pruned model", static=(0,))
def advance_pruned(function: Forward, block: Block, x: jax.Array) -> jax.Array:
    """Return the states with the pruned model's behind a block."""
    dense, pruned = halves(x)
    return joined(dense, function(block, pruned)[0])


@program("dense states copied")
def copy_dense(x: jax.Array) -> jax.Array:
    """Return the states with the dense model's in place of the pruned one's."""
    dense = halves(x)[0]
    return joined(dense, dense)


@program("magnitudes at a cut")
def add_ratios(x: jax.Array, total: jax.Array) -> jax.Array:
    """Add the ratios of the dense states to the pruned ones."""
    return total + sum_of_ratios(*halves(x))


@program("stream scaled")
def scale_pruned(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Return the states with the pruned model's times a factor."""
    dense, pruned = halves(x)
    return joined(dense, (pruned.astype(jnp.float32) * factor).astype(x.dtype))


@program("statistics of a cut begun", static=(0, 1))
def begin_stats(function: Forward, tap: str, block: Block, x: jax.Array) -> CutStats:
    """Return the sums over no tokens."""
    y, taps = jax.eval_shape(function, block, x)
    return begin_cut_stats(taps[tap].shape[-1], y.shape[-1])


# The old sums are donated: a Gram matrix of 70B's widths would lie in memory twice.
@program("statistics of a cut", static=(0, 1), donated=(4,))
def observe_cut(
    function: Forward, tap: str, block: Block, x: jax.Array, stats: CutStats
) -> CutStats:
    """Run the pruned model's block and compare its output with the dense model's states."""
    target, inputs = halves(x)
    y, taps = function(block, inputs)
    return add_cut_stats(stats, taps[tap], y, target)


def run_all(step: Program, arch: Arch, block: Block, xs: States) -> None:
    """Replace the states of every micro-batch by those behind a block.

    Args:
      step: `advance_both`, `advance_dense` or `advance_pruned`.
      arch: Architecture of the block.
      block: Parameters.
      xs: States of both models, by micro-batch.
    """
    for j, x in enumerate(xs):
        xs[j] = step(arch.block, block, x)


def cut_stats(arch: Arch, name: str, block: Block, xs: States) -> CutStats:
    """Return the sums for the last linear of a block and the dense states behind it.

    Args:
      arch: Architecture of the block.
      name: Slot of the linear.
      block: Parameters.
      xs: States of both models, by micro-batch: the dense ones are the target, the pruned ones the
        block's inputs.
    """
    tap = arch.tap(name)
    stats: CutStats = begin_stats(arch.block, tap, block, xs[0])
    for x in xs:
        stats = observe_cut(arch.block, tap, block, x, stats)
    return stats


def fitted(arch: Arch, linear: Linear, stats: CutStats, i: int) -> tuple[Linear, dict[str, Any]]:
    """Return a linear fitted to its target, and the figures of the fit.

    Args:
      arch: Architecture of its block.
      linear: Linear that writes to the stream.
      stats: Sums over the calibration tokens.
      i: Index of the block, for messages.
    """
    linear, errors = _refit(linear, stats, np.float32(arch.branch_scale))
    before, after = (float(e) for e in to_host(errors))
    if not math.isfinite(before + after):
        raise overflow(i)
    return linear, {"error": [before, after]}


def fit_before_cut(
    arch: Arch, name: str, block: Block, xs: States, i: int
) -> tuple[Block, dict[str, Any]]:
    """Return a block with its last linear fitted to the dense states, and the figures of the fit.

    Args:
      arch: Architecture of the block.
      name: Slot of the linear.
      block: Parameters.
      xs: States of both models, as `cut_stats` has them.
      i: Index of the block, for messages.
    """
    stats = cut_stats(arch, name, block, xs)
    linear, figures = fitted(arch, getattr(block, name), stats, i)
    return block.replace(**{name: linear}), figures


# Donated, as in `observe_cut`.
@program("statistics of merged attention", static=(0, 1, 2), donated=(5,))
def observe_attention(
    function: Forward,
    writer: str,
    tap: str,
    blocks: tuple[Block, Block, Block],
    x: jax.Array,
    stats: CutStats,
    branch_scale: jax.Array,
) -> CutStats:
    """Compare what the attention of a merged block adds with what it should add.

    It should add what the pruned model's block adds so far, and what the dense model's next block
    adds where it stands. `blocks` are the merged one and these two.
    """
    merged, before, added = blocks
    dense, inputs = halves(x)
    taps = function(merged, inputs)[1]
    wanted = function(before, inputs)[1][writer], function(added, dense)[1][writer]
    start, y, *parts = (a.astype(jnp.float32) for a in (inputs, taps[writer], *wanted))
    target = start + branch_scale * sum(parts)
    return add_cut_stats(stats, taps[tap], start + branch_scale * y, target)
