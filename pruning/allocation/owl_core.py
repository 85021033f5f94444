"""OWL (Yin et al. 2024), maths: the share of outliers among scores."""

import jax
import jax.numpy as jnp


def outliers(metrics: list[jax.Array], m: jax.Array | float) -> jax.Array:
    """The share of entries of all metrics [out in] that lie above `m` times their common mean (eq. 2), float32 []."""
    size = sum(x.size for x in metrics)
    mean = jnp.sum(jnp.stack([jnp.sum(x) for x in metrics])) / size
    return jnp.sum(jnp.stack([jnp.sum(x > m * mean) for x in metrics]).astype(jnp.float32)) / size
