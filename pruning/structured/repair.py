"""Making good what a reader of removed units no longer gets. Arrays only; masks, so that one compilation serves every selection."""

import jax
import jax.numpy as jnp

from models.layers import Linear
from pruning import linalg as inverse

# Added to the diagonal of the Gram matrix, as a share of its mean. SparseGPT's 0.01 fits the calibration text more than the model, and 0.5
# holds on too firmly where much goes (BUILD_NOTES.md).
RIDGE = 0.1


def bias(p: Linear, mean: jax.Array, keep: jax.Array) -> Linear:
    """The linear [out in] with the mean output of the inputs that go in its bias (FLAP, An et al. 2024, eq. 8).

    Args:
      mean: of every input over the calibration tokens, float32 [in]; keep: bool [in].
    """
    lost = p.w.astype(jnp.float32) @ jnp.where(keep, 0.0, mean)
    return _with_bias(p, p.w, lost)


def least_squares(
    p: Linear, total: jax.Array, mean: jax.Array, tokens: jax.Array, keep: jax.Array
) -> Linear:
    """The linear [out in] whose kept columns and bias give its dense output best, in the least squares over the calibration tokens, held to
    its weights by a ridge.

    With C the covariance of the inputs, K what stays and G what goes, W' = W_K + W_G C_GK (C_KK + ridge)^-1 and b' = b + W mean - W' mean.

    Args:
      total: sum of x x^T [in in] over `tokens` tokens; mean: of x [in]; keep: bool [in].
    """
    with jax.default_matmul_precision("highest"):
        c = total / tokens - mean[:, None] * mean[None, :]
        both = keep[:, None] & keep[None, :]
        inside = jnp.where(both, c, 0.0)
        ridge = RIDGE * jnp.sum(jnp.diagonal(inside)) / jnp.maximum(jnp.sum(keep), 1)
        inside = inside + jnp.diag(jnp.where(keep, ridge, 1.0))
        w = p.w.astype(jnp.float32)
        # W' - W on what stays: fits only what is lost, so that with nothing removed nothing changes.
        lost = jnp.where(keep[None, :], 0.0, w)
        fitted = inverse.solve(inside, jnp.where(keep[:, None], c, 0.0) @ lost.T).T
        new = jnp.where(keep[None, :], w + fitted, 0.0)
        return _with_bias(p, new, (w - new) @ mean)


def _with_bias(p: Linear, w: jax.Array, more: jax.Array) -> Linear:
    old = 0.0 if p.b is None else p.b.astype(jnp.float32)
    return Linear(w.astype(p.w.dtype), (old + more).astype(p.w.dtype))
