"""DSnoT (Zhang et al. 2024): swap kept and removed weights of a finished mask so that each row's expected output stays.

Letters: c [out in], which is W E[x], is what a weight gives its row's output on average, e [out] what the row lacks of the dense one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from calibration.observers import Moments

Mask = jax.Array  # bool; True is kept

MANTISSA = 21  # bits of a metric that are looked at, of float32's 23
ENOUGH = 0.1  # the released code leaves a row alone once it lacks no more than this, x summed over a window


class Settings(NamedTuple):
    """cycles: swaps tried in each row; official: with the released code's statistics and its rule of when to stop."""

    cycles: int
    official: bool


def swapped(
    c: jax.Array, e: jax.Array, metric: jax.Array, variance: jax.Array, kept: Mask, s: Settings
) -> Mask:
    """The mask [out in] after up to `s.cycles` swaps in each row, which keeps as many entries as before.

    Each swap takes back the removed weight that gives most of what the row lacks, for the variance of its input, and removes the least
    important of those kept weights that the row is nearer to its dense output without (section 3 of the paper). No weight moves twice.

    Args:
      c: contributions [out in]; e: what each row lacks [out]; metric: |W| |x| [out in]; variance: of each input [in].
    """
    spread = jnp.where(variance > 0, variance, jnp.inf)[None, :]

    def cycle(state: tuple[Mask, jax.Array, jax.Array]) -> tuple[Mask, jax.Array, jax.Array]:
        now, e, open_ = state
        sign = jnp.sign(e)[:, None]
        growing = jnp.where(~kept & ~now, sign * c / spread, -jnp.inf)
        unmoved = kept & now
        wrong = unmoved & (sign * c < 0)
        least = jnp.argmin(jnp.where(wrong, metric, jnp.inf), axis=1)
        most = jnp.argmax(
            jnp.where(unmoved, metric, -jnp.inf), axis=1
        )  # where the released code goes on once those are gone
        g, p = (
            jnp.argmax(growing, axis=1)[:, None],
            jnp.where(jnp.any(wrong, axis=1), least, most)[:, None],
        )
        there = (jnp.take_along_axis(growing, g, 1) > 0) & jnp.any(
            unmoved if s.official else wrong, axis=1, keepdims=True
        )
        after = (e + jnp.take_along_axis(c, p, 1)[:, 0]) - jnp.take_along_axis(c, g, 1)[:, 0]
        better = jnp.abs(e) > ENOUGH if s.official else jnp.abs(after) < jnp.abs(e)
        open_ = open_ & better & there[:, 0]
        columns = jnp.arange(c.shape[1])[None, :]
        moved = open_[:, None] & ((columns == g) | (columns == p))
        return now ^ moved, jnp.where(open_, after, e), open_

    def unfinished(state: tuple[jax.Array, tuple[Mask, jax.Array, jax.Array]]) -> jax.Array:
        return (state[0] < s.cycles) & jnp.any(state[1][2])

    start = (jnp.asarray(0), (kept, e, jnp.ones(len(c), bool)))
    return jax.lax.while_loop(unfinished, lambda state: (state[0] + 1, cycle(state[1])), start)[1][
        0
    ]


def refine(
    dense: jax.Array, pruned: jax.Array, kept: Mask, stats: Moments, s: Settings
) -> tuple[jax.Array, Mask]:
    """A pruned matrix [out in] and its mask after the swaps; a weight that comes back has its dense value."""
    w = jnp.where(kept, pruned, dense).astype(jnp.float32)
    mean = stats.window_sum if s.official else stats.mean
    variance = stats.variance_within if s.official else stats.variance
    e = jnp.sum((dense.astype(jnp.float32) - pruned.astype(jnp.float32)) * mean[None, :], axis=1)
    # Without the last bits of rounding: of metrics that equal but for noise the first goes, whatever the devices and micro-batches.
    metric = jax.lax.reduce_precision(
        jnp.abs(w) * jnp.sqrt(stats.second.per_sample)[None, :], 8, MANTISSA
    )
    now = swapped(w * mean[None, :], e, metric, variance, kept, s)
    return jnp.where(now, w, 0).astype(dense.dtype), now
