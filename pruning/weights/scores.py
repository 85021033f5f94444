"""Scores of single weights: how much each entry of a linear's matrix matters."""

import functools
from collections.abc import Callable, Mapping

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


@functools.cache  # equal powers must give one static argument of jit
def norm_power(
    power: float,
) -> Callable[[SecondMoment], tuple[jax.Array, Mapping[str, jax.Array]]]:
    """Return the preparation of `ria`: second moments -> (||X_j||_2^a, float32 [in], no figures).

    It is a program of its own, as a power may round differently wherever it is computed again.

    Args:
      power: Exponent a.
    """

    def prepare(stats: SecondMoment) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        return jnp.sqrt(stats.per_sample) ** power, {}

    return prepare


def ria(w: jax.Array, scale: jax.Array) -> jax.Array:
    """Return (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) ||X_j||_2^a, float32 [out in].

    Source: Zhang et al. 2024, eq. 4 and 5.

    Args:
      w: Matrix [out in].
      scale: Powers of the norms of the inputs, as `norm_power` prepares them, float32 [in].
    """
    chex.assert_rank(w, 2)
    chex.assert_shape(scale, (w.shape[1],))
    size = jnp.abs(w.astype(jnp.float32))
    # Without a lower bound a row or a column of zeros would give 0 / 0.
    tiny = jnp.finfo(jnp.float32).tiny
    of_input = jnp.maximum(jnp.sum(size, axis=0, keepdims=True), tiny)
    of_output = jnp.maximum(jnp.sum(size, axis=1, keepdims=True), tiny)
    # Not a sum of two products: the compiler may fuse one of them with the sum in one place and
    # not in another, and a threshold must be one of the scores that are compared with it.
    return size * (1 / of_input + 1 / of_output) * scale[None, :]
