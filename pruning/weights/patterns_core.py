"""Patterns, maths: keep masks from scores and counts, which stay traced data.

A threshold is the value of a rank. `jax.lax.top_k` could not take a traced count, and would compile
again for every budget.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

Mask = jax.Array  # bool, the shape of what it masks; True is kept
# Share of a matrix by which ties may exceed the count. The authors' code lets all ties go, and
# weights from float16 tie now and then: up to here the result is theirs.
SLACK = 0.005


class Pattern(NamedTuple):
    """Rule for which entries of a score matrix to remove.

    Attributes:
      counts: (shape (out, in), fraction () or [out]) -> int32 () or [out]: number of entries to
        remove. Computed on the host in float64, so that float32 rounding cannot move it, and passed
        on as data, so that one compilation serves every budget.
      keep: (score [out in], count) -> bool [out in], True where the entry stays. Pure, under jit.
      group: m where every m consecutive inputs are chosen from on their own, else None.
      by_row: Whether every row may have its own fraction.
      whole: `keep` for a whole matrix, where that of the pattern takes a part; None if it does not.
    """

    counts: Callable[[tuple[int, int], np.ndarray], np.ndarray]
    keep: Callable[[jax.Array, jax.Array], Mask]
    group: int | None = None
    by_row: bool = True
    whole: Callable[[jax.Array, jax.Array], Mask] | None = None

    @property
    def keep_whole(self) -> Callable[[jax.Array, jax.Array], Mask]:
        """Return the function that keeps entries of a whole matrix, [out in]."""
        return self.whole or self.keep


def value_of_rank(x: jax.Array, rank: jax.Array, axis: int | None = None) -> jax.Array:
    """Return the entry that `rank` entries come before in ascending order.

    Its bits are settled one by one, from counts of smaller entries: 32 passes, ten times cheaper
    than a sort, and split over devices by counting.

    Args:
      x: Values, float32, none NaN.
      rank: Rank from 0, [] or of x's shape with length 1 along the axis.
      axis: Axis to rank along; None: all entries.

    Returns:
      The value, []; with an axis, which stays with length 1, of rank's shape.
    """

    def count(keys: Sequence[jax.Array], below: jax.Array) -> jax.Array:
        return jnp.sum(keys[0] < below, axis=axis, keepdims=axis is not None, dtype=jnp.int32)

    return _settle([x], rank, count)


def value_of_rank_in_all(xs: Sequence[jax.Array], rank: int) -> jax.Array:
    """Return the entry of several matrices that `rank` entries come before in ascending order.

    They are counted where they lie, and never joined.

    Args:
      xs: Values, float32, none NaN.
      rank: Rank from 0 among all entries.

    Returns:
      The value, float32 [].
    """

    def count(keys: Sequence[jax.Array], below: jax.Array) -> jax.Array:
        counts = [jnp.sum(key < below, dtype=jnp.int32) for key in keys]
        return jnp.sum(jnp.stack(counts), dtype=jnp.int32)

    return _settle(xs, jnp.int32(rank), count)


def _settle(
    xs: Sequence[jax.Array],
    rank: jax.Array,
    count: Callable[[Sequence[jax.Array], jax.Array], jax.Array],
) -> jax.Array:
    """Return the value of a rank, bit by bit.

    Args:
      xs: Values, float32.
      rank: Rank from 0.
      count: (the values as integers in their order, a threshold) -> how many lie below it.
    """
    for x in xs:
        chex.assert_type(x, jnp.float32)
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in xs]
    # Integers in the floats' order: the map is its own inverse.
    keys = [b ^ ((b >> 31) & 0x7FFFFFFF) for b in bits]

    def settle_bit(i: jax.Array, key: jax.Array) -> jax.Array:
        # The first bit flips the sign of the least integer.
        trial = key ^ jax.lax.shift_left(jnp.int32(1), 31 - i)
        return jnp.where(count(keys, trial) <= rank, trial, key)

    # A count of nothing plus a constant, so that the start is split over devices as x is.
    least = count(keys, jnp.int32(jnp.iinfo(jnp.int32).min)) + jnp.iinfo(jnp.int32).min
    key = jax.lax.fori_loop(0, 32, settle_bit, least)
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def keep_per_matrix(score: jax.Array, count: jax.Array) -> Mask:
    """Keep entries above the score of rank `count`.

    Ties with that score go too, as in Wanda's repository.

    Args:
      score: Scores, float32 [out in].
      count: Rank, int32 []; 0 keeps everything.
    """
    chex.assert_rank([score, count], [2, 0])
    return (score > value_of_rank(score, count)) | (count == 0)


def keep_budget_per_matrix(score: jax.Array, count: jax.Array) -> Mask:
    """Keep entries as `keep_per_matrix` does, but meet the count where many scores are equal.

    Ties beyond `SLACK` of the matrix are broken: every row gives up the same share of its own, the
    leftmost first.

    Args:
      score: Scores, float32 [out in].
      count: Entries to remove, int32 []; 0 keeps everything.
    """
    keep = keep_per_matrix(score, count)
    removed = jnp.sum(~keep, dtype=jnp.int32)
    most = max(1, int(SLACK * score.size))
    # A branch, because the work is for matrices that real models hardly have.
    return jax.lax.cond(
        (count > 0) & (removed - count > most), _break_ties, lambda *_: keep, score, count
    )


def _break_ties(score: jax.Array, count: jax.Array) -> Mask:
    """Keep all but `count` entries; equal ones go from every row alike."""
    threshold = value_of_rank(score, count)
    below, tied = score < threshold, score == threshold
    ties = jnp.sum(tied, axis=1, dtype=jnp.int32)  # [out]
    left = count - jnp.sum(below, dtype=jnp.int32)
    # A little less than the share, so that rounding does not exceed it; what is left over goes one
    # by one to the first rows.
    share = left.astype(jnp.float32) / jnp.sum(ties).astype(jnp.float32) * (1 - 1e-6)
    quota = (ties.astype(jnp.float32) * share).astype(jnp.int32)
    has_more = (ties > quota).astype(jnp.int32)
    gives_one = (has_more > 0) & (jnp.cumsum(has_more) <= left - jnp.sum(quota))
    quota += gives_one.astype(jnp.int32)
    nth = jax.lax.cumsum(tied.astype(jnp.int32), axis=1)
    return ~(below | (tied & (nth <= quota[:, None])))


def keep_per_row(score: jax.Array, count: jax.Array) -> Mask:
    """Keep all but the lowest entries of each row.

    Of equal entries the leftmost go first, as in a stable sort. Where every row has its own count
    the rightmost go first, as in NeuroAL's repository.

    Args:
      score: Scores, float32 [out in].
      count: Entries to remove from each row, int32 [] or [out].
    """
    chex.assert_rank([score, count], [2, {0, 1}])
    reverse = count.ndim == 1
    count = jnp.broadcast_to(count, score.shape[:1])[:, None]  # [out 1]
    threshold = value_of_rank(score, jnp.maximum(count - 1, 0), axis=1)
    below, tied = score < threshold, score == threshold
    # Ties by a running count: several times cheaper than sorting indices, and the same.
    left = count - jnp.sum(below, axis=1, keepdims=True)
    nth = jax.lax.cumsum(tied.astype(jnp.int32), axis=1, reverse=reverse)
    return ~(below | (tied & (nth <= left)))


def keep_count_per_matrix(score: jax.Array, count: jax.Array) -> Mask:
    """Keep all but the lowest entries of a matrix, as many as asked; of equal ones the first go.

    Args:
      score: Scores, float32 [out in].
      count: Entries to remove, int32 [].
    """
    return keep_per_row(score.reshape(1, -1), count).reshape(score.shape)


def keep_in_column_block(score: jax.Array, count: jax.Array) -> Mask:
    """Keep entries of a block of columns, by row where every row has its own count.

    Args:
      score: Scores, float32 [out columns].
      count: Entries to remove, int32 [] of the block or [out] of its rows.
    """
    return keep_per_row(score, count) if count.ndim else keep_per_matrix(score, count)


def keep_over_column_blocks(score: jax.Array, counts: jax.Array) -> Mask:
    """Keep entries of a whole matrix, as many as all of its column blocks keep.

    Args:
      score: Scores, float32 [out in].
      counts: Entries to remove from each block, int32 [blocks], or of its rows [blocks out].
    """
    return keep_in_column_block(score, jnp.sum(counts, axis=0))


def keep_n_of_m(m: int, score: jax.Array, count: jax.Array) -> Mask:
    """Keep all but the lowest of every m consecutive inputs; of equal ones the rightmost go first.

    Args:
      m: Size of a group, a divisor of `in`.
      score: Scores, float32 [out in].
      count: Entries to remove from each group, int32 [].
    """
    chex.assert_rank(score, 2)
    s = score.reshape(score.shape[0], -1, m)
    a, b = s[..., :, None], s[..., None, :]
    # torch.topk, which the papers' code uses, settles ties by the inner workings of a partial sort;
    # this order agrees with it most often.
    b_is_right = jnp.triu(jnp.ones((m, m), bool), 1).reshape(1, 1, m, m)
    rank = jnp.sum((b < a) | ((b == a) & b_is_right), axis=-1)
    return (rank >= count).reshape(score.shape)
