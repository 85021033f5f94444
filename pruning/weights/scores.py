"""Scores of single weights: how much each entry of a linear's matrix matters."""

import chex
import jax
import jax.numpy as jnp

from calibration.observers import SecondMoment


def magnitude(w: jax.Array, stats: None) -> jax.Array:
    """Return |W|, float32 [out in].

    Args:
      w: Matrix [out in].
      stats: No statistics are needed.
    """
    chex.assert_rank(w, 2)
    # Weights from float16 tie often. float32 holds them exactly, so they tie here too.
    return jnp.abs(w.astype(jnp.float32))


def wanda(w: jax.Array, stats: SecondMoment) -> jax.Array:
    """Return |W_ij| ||X_j||_2, float32 [out in].

    Source: Sun et al. 2024, eq. 1; X_j is the j-th input channel over all calibration tokens.

    Args:
      w: Matrix [out in].
      stats: Second moments of the inputs.
    """
    chex.assert_rank(w, 2)
    chex.assert_shape(stats.total, (w.shape[1],))
    # A mean over windows, as the official `scaler_row`. A common factor moves no mask.
    return jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(stats.per_sample)[None, :]


def multiflow(w: jax.Array, stats: SecondMoment) -> jax.Array:
    """Return |W_ij| mean_k(|W_ik| a_k) mean_k(|W_kj| a_j), float32 [out in].

    Source: Farina et al. 2024, eq. 6; a are the norms of the input channels.

    Args:
      w: Matrix [out in].
      stats: Second moments of the inputs.
    """
    edge = wanda(w, stats)
    # Within a row the first factor is a constant. It decides nothing where rows are ranked alone.
    flow = jnp.mean(edge, axis=1, keepdims=True) * jnp.mean(edge, axis=0, keepdims=True)
    return jnp.abs(w.astype(jnp.float32)) * flow
