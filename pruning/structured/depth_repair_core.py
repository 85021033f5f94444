"""Fit the linear before a cut to the stream that the removed blocks would have left.

Letters: b windows, t tokens, c inputs of the linear, d hidden size.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from models.layers import Linear
from pruning import linalg

# Added to the diagonal of the Gram matrix, as a share of its mean: holds on to the dense weights.
# With 12 windows 0.1 and 0.03 follow the calibration text more (docs/methods/sleb.md).
RIDGE = 0.3
# Added to mean squares, so that a stream of zeros gives no NaN; below any that matters.
TINY = 1e-20


class CutStats(NamedTuple):
    """Sums over tokens, each weighted by 1 / mean square of its target.

    Attributes:
      gram: Sum of h h^T, for the linear's inputs h [c c].
      cross: Sum of e h^T, for what the stream lacks e = target - stream [d c].
      inputs: Sum of h [c].
      lacks: Sum of e [d].
      weight: Sum of the weights ().
      error: Sum of the mean squares of e ().
      tokens: Number of tokens ().
    """

    gram: jax.Array
    cross: jax.Array
    inputs: jax.Array
    lacks: jax.Array
    weight: jax.Array
    error: jax.Array
    tokens: jax.Array


def begin_cut_stats(channels: int, dim: int) -> CutStats:
    """Return sums over no tokens.

    Args:
      channels: Number of inputs c of the linear.
      dim: Hidden size d.
    """
    zero = jnp.zeros(())
    return CutStats(
        jnp.zeros((channels, channels)),
        jnp.zeros((dim, channels)),
        jnp.zeros(channels),
        jnp.zeros(dim),
        zero,
        zero,
        zero,
    )


def add_cut_stats(stats: CutStats, h: jax.Array, y: jax.Array, target: jax.Array) -> CutStats:
    """Add a micro-batch to the sums.

    Args:
      stats: Sums so far.
      h: Inputs of the linear [b t c].
      y: Stream after it [b t d].
      target: Stream that should be there [b t d].
    """
    chex.assert_rank([h, y, target], 3)
    chex.assert_equal_shape([y, target])
    h, y, target = (a.astype(jnp.float32) for a in (h, y, target))
    # TPUs multiply float32 in bfloat16 passes by default, too coarse to invert a Gram matrix.
    with jax.named_scope("cut_stats"), jax.default_matmul_precision("highest"):
        weight = 1 / (jnp.mean(target * target, axis=-1) + TINY)
        lacks = target - y
        weighted = h * weight[..., None]
        return CutStats(
            stats.gram + jnp.einsum("btc,bte->ce", weighted, h),
            stats.cross + jnp.einsum("btd,btc->dc", lacks, weighted),
            stats.inputs + jnp.sum(weighted, axis=(0, 1)),
            stats.lacks + jnp.sum(lacks * weight[..., None], axis=(0, 1)),
            stats.weight + jnp.sum(weight),
            stats.error + jnp.sum(jnp.mean(lacks * lacks, axis=-1) * weight),
            stats.tokens + weight.size,
        )


def refit_before_cut(
    linear: Linear, stats: CutStats, branch_scale: jax.Array
) -> tuple[Linear, jax.Array]:
    """Fit a linear so that the stream after it comes near its target.

    With G the Gram matrix of the inputs and C their cross products with what the stream lacks,
    W' = W + C (G + ridge)^-1. A bias that the linear has takes up the means.

    Args:
      linear: Last linear before the cut, [d c].
      stats: Sums over the calibration tokens.
      branch_scale: Factor of the linear's output in the stream, float32 ().

    Returns:
      The fitted linear, and the mean over tokens of |stream - target|^2 / |target|^2 before and
      after, float32 [2].
    """
    chex.assert_rank(linear.w, 2)
    chex.assert_shape(stats.cross, linear.w.shape)
    with jax.named_scope("refit"), jax.default_matmul_precision("highest"):
        gram, cross = stats.gram, stats.cross
        mean_h, mean_e = stats.inputs / stats.weight, stats.lacks / stats.weight
        left = stats.error
        if linear.b is not None:
            gram = gram - stats.weight * mean_h[:, None] * mean_h[None, :]
            cross = cross - stats.weight * mean_e[:, None] * mean_h[None, :]
            left = left - stats.weight * jnp.mean(mean_e * mean_e)
        ridge = RIDGE * jnp.mean(jnp.diagonal(gram))
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        # Solve for the change: where the stream lacks nothing, nothing changes.
        change = linalg.solve(gram + ridge * eye, cross.T).T
        left = left + jnp.sum(change * (change @ gram - 2 * cross)) / len(cross)
        w = linear.w.astype(jnp.float32) + change / branch_scale
        b = linear.b
        if b is not None:
            more = (mean_e - change @ mean_h) / branch_scale
            b = (b.astype(jnp.float32) + more).astype(b.dtype)
        errors = jnp.stack([stats.error, left]) / stats.tokens
        return Linear(w.astype(linear.w.dtype), b), errors


def sum_of_ratios(target: jax.Array, stream: jax.Array) -> jax.Array:
    """Return the sum over tokens of |target| / |stream|, and their number, float32 [2].

    Args:
      target: States of the dense model [b t d].
      stream: States of the pruned model [b t d].
    """
    chex.assert_rank(target, 3)
    chex.assert_equal_shape([target, stream])
    with jax.named_scope("magnitudes"):
        target, stream = target.astype(jnp.float32), stream.astype(jnp.float32)
        squares = jnp.sum(target * target, axis=-1) / (jnp.sum(stream * stream, axis=-1) + TINY)
        return jnp.stack([jnp.sum(jnp.sqrt(squares)), jnp.float32(squares.size)])
