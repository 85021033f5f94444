"""DSnoT (Zhang et al. 2024), maths: swap kept and removed weights so that outputs keep their mean.

Letters: c [out in] = W E[x] is what each weight adds to the mean output of its row; e [out] is what
the mean output of a pruned row lacks of the dense one.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from calibration.moments import Moments
from pruning.weights.patterns_core import Mask

# Bits of a metric that decide, of float32's 23.
MANTISSA = 21
# The official code leaves a row alone once it lacks no more than this, x summed over a window.
OFFICIAL_TOLERANCE = 0.1


class Settings(NamedTuple):
    """Settings of the swaps; hashable, a static argument.

    Attributes:
      cycles: Most swaps in a row.
      official: Use the statistics and the stopping rule of the authors' code.
    """

    cycles: int
    official: bool


class _State(NamedTuple):
    """State of the swaps: kept mask [out in], lack e [out], and rows still open, bool [out]."""

    kept: Mask
    e: jax.Array
    open: jax.Array


def _swap_once(
    state: _State,
    c: jax.Array,
    metric: jax.Array,
    variance: jax.Array,
    start: Mask,
    official: bool,
) -> _State:
    """Swap one kept and one removed weight in every open row where that helps."""
    kept, e, is_open = state
    sign = jnp.sign(e)[:, None]
    # No weight moves twice: candidates are removed, or kept, now and at the start.
    growing = jnp.where(~start & ~kept, sign * c / variance, -jnp.inf)
    unmoved = start & kept
    harmful = unmoved & (sign * c < 0)
    least = jnp.argmin(jnp.where(harmful, metric, jnp.inf), axis=1)
    # The official code goes on at the other end of its list once no harmful weight is left.
    most = jnp.argmax(jnp.where(unmoved, metric, -jnp.inf), axis=1)
    grown = jnp.argmax(growing, axis=1)[:, None]
    pruned = jnp.where(jnp.any(harmful, axis=1), least, most)[:, None]
    can_grow = jnp.take_along_axis(growing, grown, 1) > 0
    can_prune = jnp.any(unmoved if official else harmful, axis=1, keepdims=True)
    exists = can_grow & can_prune
    lost = jnp.take_along_axis(c, pruned, 1)[:, 0]
    gained = jnp.take_along_axis(c, grown, 1)[:, 0]
    after = (e + lost) - gained
    helps = jnp.abs(e) > OFFICIAL_TOLERANCE if official else jnp.abs(after) < jnp.abs(e)
    is_open = is_open & helps & exists[:, 0]
    columns = jnp.arange(c.shape[1])[None, :]
    moved = is_open[:, None] & ((columns == grown) | (columns == pruned))
    return _State(kept ^ moved, jnp.where(is_open, after, e), is_open)


def swap(
    c: jax.Array, e: jax.Array, metric: jax.Array, variance: jax.Array, kept: Mask, s: Settings
) -> Mask:
    """Swap weights in each row until no swap helps or all cycles are done.

    Each swap restores the removed weight that adds most of what the row lacks, relative to its
    input's variance, and removes the least important kept weight that pulls the row away from its
    dense output. Source: Zhang et al. 2024, section 3.

    Args:
      c: Contributions, float32 [out in].
      e: Lack of each row, float32 [out].
      metric: Importance |W| |x|, float32 [out in].
      variance: Variance of each input, float32 [in].
      kept: Mask to start from, bool [out in].
      s: Settings.

    Returns:
      A mask [out in] that keeps as many entries of each row.
    """
    chex.assert_rank([c, e, variance], [2, 1, 1])
    chex.assert_equal_shape([c, metric, kept])
    chex.assert_shape([e, variance], [(c.shape[0],), (c.shape[1],)])
    # An input that never varies gains nothing, so it is never restored.
    divisor = jnp.where(variance > 0, variance, jnp.inf)[None, :]

    def unfinished(carry: tuple[jax.Array, _State]) -> jax.Array:
        cycle, state = carry
        return (cycle < s.cycles) & jnp.any(state.open)

    def advance(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        cycle, state = carry
        return cycle + 1, _swap_once(state, c, metric, divisor, kept, s.official)

    start = _State(kept, e, jnp.ones(len(c), bool))
    with jax.named_scope("swap"):
        _, final = jax.lax.while_loop(unfinished, advance, (jnp.asarray(0), start))
    return final.kept


def refine(
    dense: jax.Array, pruned: jax.Array, kept: Mask, stats: Moments, s: Settings
) -> tuple[jax.Array, Mask]:
    """Refine the mask of a pruned matrix.

    Args:
      dense: Dense matrix [out in].
      pruned: Pruned matrix [out in].
      kept: Its mask, bool [out in].
      stats: Moments of the inputs.
      s: Settings.

    Returns:
      The matrix [out in], in which restored weights have their dense values, and its mask.
    """
    chex.assert_equal_shape([dense, pruned, kept])
    w = jnp.where(kept, pruned, dense).astype(jnp.float32)
    # The official code sums x over a window, and takes the variance within windows only.
    mean = stats.window_sum if s.official else stats.mean
    variance = stats.variance_within if s.official else stats.variance
    e = jnp.sum((dense.astype(jnp.float32) - pruned.astype(jnp.float32)) * mean[None, :], axis=1)
    # Without the last bits, which differ between devices and micro-batches: of metrics that are
    # equal but for rounding, the first goes.
    metric = jax.lax.reduce_precision(
        jnp.abs(w) * jnp.sqrt(stats.second.per_sample)[None, :], 8, MANTISSA
    )
    refined = swap(w * mean[None, :], e, metric, variance, kept, s)
    return jnp.where(refined, w, 0).astype(dense.dtype), refined
