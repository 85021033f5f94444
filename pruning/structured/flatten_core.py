"""Choose what a merged block keeps, and the sums that its refit needs.

Letters: c inputs of a linear that writes to the stream, d hidden size, k kept inputs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from models.layers import Linear
from pruning import linalg
from pruning.structured.depth_repair_core import CutStats

# Ridge of the leverage scores, in mean eigenvalues of the Gram matrix; of the paper.
LEVERAGE_RIDGE = 10.0


def channel_power(stats: CutStats, linear: Linear) -> jax.Array:
    """Return what each input channel adds to the stream: its mean square, float32 [c].

    Args:
      stats: Sums over tokens.
      linear: Linear that reads the channels, [d c].
    """
    chex.assert_shape(stats.gram, (linear.w.shape[1],) * 2)
    with jax.named_scope("channel_power"):
        columns = jnp.sum(jnp.square(linear.w.astype(jnp.float32)), axis=0)
        return jnp.diagonal(stats.gram) / stats.weight * columns


def leverage(gram: jax.Array) -> jax.Array:
    """Return the ridge leverage score of each channel, float32 [c].

    With C the Gram matrix, [C (C + ridge)^-1]_ii = 1 - ridge [(C + ridge)^-1]_ii.

    Args:
      gram: Sum over tokens of h h^T, float32 [c c].
    """
    chex.assert_shape(gram, (len(gram), len(gram)))
    with jax.named_scope("leverage"), jax.default_matmul_precision("highest"):
        ridge = LEVERAGE_RIDGE * jnp.mean(jnp.diagonal(gram))
        factor = linalg.inverse_factor(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype))
        # (C + ridge)^-1 = U^T U, so its diagonal has the squared norms of U's columns.
        return 1 - ridge * jnp.sum(factor * factor, axis=0)


def without_channels(
    stats: CutStats, linear: Linear, kept: np.ndarray, branch_scale: jax.Array
) -> CutStats:
    """Return the sums for a linear that reads some of its channels alone.

    What the dropped channels added to the stream is then lacking too.

    Args:
      stats: Sums for the whole linear.
      linear: The whole linear, [d c].
      kept: Indices of the channels that stay, int [k].
      branch_scale: Factor of the linear's output in the stream, float32 ().
    """
    chex.assert_shape(stats.cross, linear.w.shape)
    with jax.named_scope("without_channels"), jax.default_matmul_precision("highest"):
        dropped = jnp.ones(linear.w.shape[1]).at[kept].set(0.0)
        lost = branch_scale * linear.w.astype(jnp.float32) * dropped[None, :]
        gram = jnp.take(stats.gram, kept, axis=1)
        by_dropped = lost @ stats.gram
        more = jnp.sum(lost * (by_dropped + 2 * stats.cross)) / len(lost)
        return CutStats(
            jnp.take(gram, kept, axis=0),
            jnp.take(stats.cross + by_dropped, kept, axis=1),
            jnp.take(stats.inputs, kept),
            stats.lacks + lost @ stats.inputs,
            stats.weight,
            stats.error + more,
            stats.tokens,
        )
