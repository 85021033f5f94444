"""AlphaPruning (Lu et al. 2024), maths: power laws fitted to spectra."""

import jax
import jax.numpy as jnp
import numpy as np

BINS = 100  # of the histogram whose peak bounds where the tail may begin


def eigenvalues(w: jax.Array) -> jax.Array:
    """The squared singular values of W [out in], ascending, float32 [min(out, in)]."""
    return jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)[::-1] ** 2


def tail_exponents(e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hill's estimate of the power law that the n - i largest eigenvalues follow, and how far off it is, for every i.

    Args:
      e: eigenvalues, ascending and positive, [n].
    Returns (alpha [n], distance [n]): alpha_i = 1 + (n - i) / sum_j>=i log(e_j / e_i), and the Kolmogorov-Smirnov distance between the
    power law and the tail (Clauset et al. 2009).
    """
    n, log = len(e), jnp.log(e)

    def one(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        tail, size = jnp.arange(n) >= i, (n - i).astype(jnp.float32)
        alpha = 1 + size / jnp.sum(jnp.where(tail, log - log[i], 0))
        below = (jnp.arange(n) - i) / size
        distance = jnp.abs(1 - jnp.exp((log - log[i]) * (1 - alpha)) - below)
        return alpha, jnp.max(jnp.where(tail, distance, 0))

    return jax.lax.map(one, jnp.arange(n), batch_size=64)


def limits(e: np.ndarray, official: bool) -> tuple[float, float]:
    """Where a tail may begin: about the peak of the spectrum on a log scale. The released code takes the logarithm of the lower limit,
    which then mostly is none."""
    logs = np.log10(e)
    counts, edges = np.histogram(logs, BINS, (logs.min(), logs.max()))
    peak = 10 ** float(edges[np.argmax(counts)])
    return (np.log10(0.95 * peak) if official else 0.95 * peak), 1.5 * peak


def fractions(exponents: np.ndarray, sparsity: float, epsilon: float) -> np.ndarray:
    """What each block loses [blocks]: linear in its exponent, the most (1 + epsilon) / (1 - epsilon) times the least."""
    span = np.ptp(exponents)
    if span == 0:
        return np.full(len(exponents), sparsity)
    factor = 1 - epsilon + (exponents - exponents.min()) / span * 2 * epsilon
    return sparsity * factor
