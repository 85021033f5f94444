"""Which entries of a score matrix are removed: one threshold a matrix, the lowest of each row, n of every m inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from pruning.types import Mask, Pattern


def _counts(total: int, fraction: np.ndarray) -> np.ndarray:
    return (np.asarray(fraction, np.float64) * total).astype(np.int32)


def _counts_per_matrix(shape: tuple[int, int], fraction: np.ndarray) -> np.ndarray:
    if np.ndim(fraction):
        # Broadcasting would compare the rows' thresholds with columns where a matrix is square.
        raise InputError(
            "--allocation gives every row its own sparsity, one threshold a matrix cannot follow it: prune by row"
        )
    return _counts(shape[0] * shape[1], fraction)


def value_of_rank(x: jax.Array, rank: jax.Array, axis: int | None = None) -> jax.Array:
    """The entry of x (float32, none NaN) that `rank` entries lie before in ascending order; along an axis, which stays with length 1.

    Found bit by bit from counts of smaller entries: 32 passes, ten times cheaper than a sort, and split over devices by counting.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the floats' order: its own inverse

    def count(smaller: jax.Array) -> jax.Array:
        return jnp.sum(smaller, axis=axis, keepdims=axis is not None, dtype=jnp.int32)

    def settle(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found ^ jax.lax.shift_left(
            jnp.int32(1), 31 - i
        )  # the first flips the sign of the least integer
        return jnp.where(count(keys < trial) <= rank, trial, found)

    least = count(keys != keys) + jnp.iinfo(jnp.int32).min  # split over devices as x is
    found = jax.lax.fori_loop(0, 32, settle, least)
    return jax.lax.bitcast_convert_type(found ^ ((found >> 31) & 0x7FFFFFFF), jnp.float32)


def _keep_per_matrix(score: jax.Array, count: jax.Array) -> Mask:
    """True above the score of rank `count` (from 0): ties with it go too, as in Wanda's repository. count = 0 keeps all."""
    return (score > value_of_rank(score, count)) | (count == 0)


def _keep_per_row(score: jax.Array, count: jax.Array) -> Mask:
    """True but for the `count` lowest entries of each row; of equal ones the leftmost go first (a stable sort's order), or, where every
    row has its own count, the rightmost, as in NeuroAL's repository."""
    reverse = count.ndim == 1
    count = jnp.broadcast_to(count, score.shape[:1])[:, None]  # [out 1]
    highest_out = value_of_rank(score, jnp.maximum(count - 1, 0), axis=1)
    below, tied = score < highest_out, score == highest_out
    # Ties by a running count: several times cheaper than sorting indices, and the same.
    left = count - jnp.sum(below, axis=1, keepdims=True)
    nth = jax.lax.cumsum(tied.astype(jnp.int32), axis=1, reverse=reverse)
    return ~(below | (tied & (nth <= left)))


def _counts_per_column_block(
    columns: int, shape: tuple[int, int], fraction: np.ndarray
) -> np.ndarray:
    """[blocks] for one fraction, [blocks out] for one a row, which then loses `int(in * fraction)` over all blocks."""
    ends = np.minimum(np.arange(columns, shape[1] + columns, columns), shape[1])
    if np.ndim(fraction):
        return np.diff(
            _counts(1, ends[:, None] * np.asarray(fraction, np.float64)),
            axis=0,
            prepend=np.int32(0),
        )
    return _counts(1, np.diff(ends, prepend=0) * shape[0] * np.float64(fraction))


def _keep_in_column_block(score: jax.Array, count: jax.Array) -> Mask:
    return _keep_per_row(score, count) if count.ndim else _keep_per_matrix(score, count)


@functools.cache
def per_column_block(columns: int) -> Pattern:
    """One threshold for each block of consecutive columns, as SparseGPT has; with a budget of rows, one for each of their rows in it."""
    return Pattern(functools.partial(_counts_per_column_block, columns), _keep_in_column_block)


per_matrix = Pattern(_counts_per_matrix, _keep_per_matrix, by_row=False)
per_row = Pattern(lambda shape, fraction: _counts(shape[1], fraction), _keep_per_row)


def _keep_n_of_m(m: int, score: jax.Array, count: jax.Array) -> Mask:
    """True but for the `count` lowest of every m consecutive inputs; of equal ones the rightmost go first.

    torch.topk, which the papers' code uses, settles ties by the inner workings of a partial sort; this order agrees with it most often.
    """
    s = score.reshape(score.shape[0], -1, m)
    a, b = s[..., :, None], s[..., None, :]
    first = jnp.triu(jnp.ones((m, m), bool), 1).reshape(1, 1, m, m)  # b stands right of a
    rank = jnp.sum((b < a) | ((b == a) & first), axis=-1)
    return (rank >= count).reshape(score.shape)


@functools.cache
def n_of_m(n: int, m: int) -> Pattern:
    """n zeros in every m consecutive inputs, whatever fraction is asked for."""

    def counts(shape: tuple[int, int], fraction: np.ndarray) -> np.ndarray:
        if shape[1] % m:
            raise InputError(
                f"--pattern={n}:{m}: {shape[1]} inputs of a linear are not a multiple of {m}: choose an M that divides them"
            )
        return np.asarray(n, np.int32)

    return Pattern(counts, functools.partial(_keep_n_of_m, m), m)


def parse_pattern(text: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", None of "unstructured"; InputError for anything else, or unless 0 < n < m."""
    if text == "unstructured":
        return None
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise InputError(
            f"--pattern={text} must be unstructured, or N:M with 0 < N < M such as 2:4"
        )
    return int(n), int(m)
