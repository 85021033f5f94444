"""OWL (Yin et al. 2024), maths: the share of outliers among scores."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp


def outlier_share(metrics: Sequence[jax.Array], m: jax.Array | float) -> jax.Array:
    """Return the share of entries that lie above m times the mean.

    Source: Yin et al. 2024, eq. 2.

    Args:
      metrics: Wanda's scores A of a block's linears, float32 [out in] each.
      m: Multiple of the mean of all entries from which one is an outlier.

    Returns:
      Share of outliers, float32 [].
    """
    chex.assert_rank(metrics, 2)
    chex.assert_type(metrics, jnp.float32)
    size = sum(x.size for x in metrics)
    mean = jnp.sum(jnp.stack([jnp.sum(x) for x in metrics])) / size
    # Counts stay integers within a linear: float32 cannot count above 2^24.
    return jnp.sum(jnp.stack([jnp.sum(x > m * mean) for x in metrics]).astype(jnp.float32)) / size
