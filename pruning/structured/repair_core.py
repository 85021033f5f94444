"""Repair the reader of removed channels in closed form.

The kept channels are a mask, not a shape, so that one compilation serves every selection.
"""

import chex
import jax
import jax.numpy as jnp

from models.layers import Linear
from pruning import linalg

# Added to the diagonal of the covariance, as a share of its mean. SparseGPT's 0.01 fits the
# calibration text more than the model, and 0.5 holds on too firmly where much is removed.
RIDGE = 0.1


def add_lost_mean(linear: Linear, mean: jax.Array, keep: jax.Array) -> Linear:
    """Add the mean output of the removed channels to the bias of their reader.

    Source: An et al. 2024 (FLAP), eq. 8.

    Args:
      linear: Reader, [out in].
      mean: Mean of every channel over the calibration tokens, float32 [in].
      keep: Channels that stay, bool [in].

    Returns:
      The reader with its weights as they were and the new bias.
    """
    chex.assert_rank(linear.w, 2)
    chex.assert_shape([mean, keep], (linear.w.shape[1],))
    with jax.named_scope("lost_mean"):
        lost = linear.w.astype(jnp.float32) @ jnp.where(keep, 0.0, mean)
        return _with_bias(linear, linear.w, lost)


def refit_kept_columns(
    linear: Linear, total: jax.Array, mean: jax.Array, tokens: jax.Array, keep: jax.Array
) -> Linear:
    """Fit the kept columns and the bias to the dense output over the calibration tokens.

    With C the covariance of the channels, K those that stay and R those removed,
    W' = W_K + W_R C_RK (C_KK + ridge)^-1 and b' = b + (W - W') mean.

    Args:
      linear: Reader, [out in].
      total: Sum of x x^T over the tokens, float32 [in in].
      mean: Mean of x, float32 [in].
      tokens: Number of tokens, float32 [].
      keep: Channels that stay, bool [in].

    Returns:
      The reader with zeros in the removed columns.
    """
    chex.assert_rank(linear.w, 2)
    channels = linear.w.shape[1]
    chex.assert_shape(total, (channels, channels))
    chex.assert_shape([mean, keep], (channels,))
    # TPUs multiply float32 in bfloat16 passes by default, too coarse to invert a covariance.
    with jax.named_scope("refit"), jax.default_matmul_precision("highest"):
        covariance = total / tokens - mean[:, None] * mean[None, :]
        both_kept = keep[:, None] & keep[None, :]
        kept = jnp.where(both_kept, covariance, 0.0)
        count = jnp.maximum(jnp.sum(keep), 1).astype(jnp.float32)
        ridge = RIDGE * jnp.sum(jnp.diagonal(kept)) / count
        # Removed channels get a diagonal of 1: the matrix keeps its shape and can be inverted.
        kept = kept + jnp.diag(jnp.where(keep, ridge, 1.0))
        w = linear.w.astype(jnp.float32)
        # Solve for W' - W: where nothing is removed, nothing changes, whatever the ridge.
        lost = jnp.where(keep[None, :], 0.0, w)
        change = linalg.solve(kept, jnp.where(keep[:, None], covariance, 0.0) @ lost.T).T
        new = jnp.where(keep[None, :], w + change, 0.0)
        return _with_bias(linear, new, (w - new) @ mean)


def _with_bias(linear: Linear, w: jax.Array, extra: jax.Array) -> Linear:
    """Return the linear with weights `w` and `extra` [out] added to its bias, in its own type."""
    old = 0.0 if linear.b is None else linear.b.astype(jnp.float32)
    return Linear(w.astype(linear.w.dtype), (old + extra).astype(linear.w.dtype))
