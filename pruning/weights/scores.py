"""Scores of single weights: how much each entry of a linear's matrix matters. Pure functions of arrays."""

import jax
import jax.numpy as jnp

from calibration.observers import SecondMoment


def magnitude(w: jax.Array, stats: None) -> jax.Array:
    """|W| [out in]."""
    return jnp.abs(w.astype(jnp.float32))


def wanda(w: jax.Array, stats: SecondMoment) -> jax.Array:
    """|W_ij| * ||X_j||_2 [out in] (Sun et al. 2024, eq. 1), X_j the j-th input channel over all calibration tokens."""
    return jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(stats.per_sample)[None, :]


def multiflow(w: jax.Array, stats: SecondMoment) -> jax.Array:
    """|W_ij| * mean_k |W_ik| a_k * mean_k |W_kj| a_j [out in], a the norms of the input channels (Farina et al. 2024, eq. 6)."""
    edge = wanda(w, stats)
    flow = jnp.mean(edge, axis=1, keepdims=True) * jnp.mean(edge, axis=0, keepdims=True)
    return jnp.abs(w.astype(jnp.float32)) * flow
