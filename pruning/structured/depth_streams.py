"""Hidden states of the dense and of a pruned model over the same calibration windows.

They lie in one array, each window of the dense model before the same window of the pruned one, so
that passes over blocks keep and save them like those of one model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.arch import Block, Taps
from models.programs import program
from pruning.structured.depth_repair_core import (
    CutStats,
    add_cut_stats,
    begin_cut_stats,
    sum_of_ratios,
)

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
