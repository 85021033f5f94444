"""Error that a refit leaves when a reader loses its worst units, for every number of them at once.

With the channels from the worst to the best and R the upper triangle of their covariance C = R R^T,
the channels are R z for z without correlation, and z_j is what the better channels do not tell of
channel j. So a reader W that loses channel j after all worse ones loses |(W R)_j|^2 more, however
well the rest is refitted.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pruning import linalg
from pruning.structured.repair_core import RIDGE


def added_errors(
    w: jax.Array, total: jax.Array, mean: jax.Array, tokens: jax.Array, order: jax.Array
) -> jax.Array:
    """Return the squared error that losing each channel adds after a refit to the better ones.

    Args:
      w: Weights of the reader, [out in].
      total: Sum of x x^T over the tokens, float32 [in in].
      mean: Mean of x, float32 [in].
      tokens: Number of tokens, float32 [].
      order: Channels from the worst to the best, int [in].

    Returns:
      Mean over tokens of the squared error, summed over outputs, by place in the order, float32
      [in]. The sum of the first k is the error of a refit without the k worst channels.
    """
    chex.assert_rank(w, 2)
    channels = w.shape[1]
    chex.assert_shape(total, (channels, channels))
    chex.assert_shape([mean, order], (channels,))
    with jax.named_scope("refit_errors"), jax.default_matmul_precision("highest"):
        c = total / tokens - mean[:, None] * mean[None, :]
        # The ridge of the refit, on all channels; it also makes C positive definite.
        c = c + RIDGE * jnp.mean(jnp.diagonal(c)) * jnp.eye(channels)
        c = c[order][:, order]
        # U^T U = C^-1 gives R = C U^T, without an inverse of U.
        r = c @ linalg.inverse_factor(c).T
        return jnp.sum((w.astype(jnp.float32)[:, order] @ r) ** 2, axis=0)


def stream_inverse(x: jax.Array) -> jax.Array:
    """Return the sum over tokens of one over the mean square of the stream.

    Args:
      x: Hidden states, [b t d].
    """
    chex.assert_rank(x, 3)
    with jax.named_scope("stream_inverse"):
        # A token of zeros has no direction that an error could change.
        squares = jnp.mean(x.astype(jnp.float32) ** 2, axis=-1)
        return jnp.sum(jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1.0), 0.0))


def comparable_errors(added: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return a score of each unit by which taking the lowest of all blocks costs the least error.

    The scores are slopes of the largest convex curve below the error: where the error itself is not
    convex, units that only pay together go together.

    Args:
      added: Error that each unit adds, by place in the order [units].
      order: Units from the worst to the best, int [units].

    Returns:
      float64 [units], rising along the order.
    """
    from scipy.optimize import isotonic_regression  # a third of the time of all imports

    chex.assert_equal_shape([added, order])
    slopes = np.asarray(isotonic_regression(added.astype(np.float64)).x)
    # Equal slopes rise by a hair, so that of units that go together the worst goes first.
    slopes = np.maximum(slopes, 0) * (1 + 1e-9 * np.arange(len(slopes)))
    scores = np.empty(len(slopes))
    scores[order] = slopes
    return scores
