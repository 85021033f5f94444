"""AlphaPruning (Lu et al. 2024), maths: power laws fitted to the spectra of weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

BINS = 100  # of the histogram whose peak bounds where the tail may begin
BATCH = 64  # tails fitted at once: each takes [n], all together would take [n n]


def eigenvalues(w: jax.Array) -> jax.Array:
    """Return the squared singular values of W [out in], ascending, float32 [min(out, in)]."""
    chex.assert_rank(w, 2)
    with jax.named_scope("singular_values"):
        return jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)[::-1] ** 2


def tail_exponents(e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fit a power law to the n - i largest eigenvalues, for every i.

    Source: Lu et al. 2024, eq. 1 (Hill's estimator); Clauset et al. 2009 for the distance.

    Args:
      e: Eigenvalues, ascending and positive, float32 [n].

    Returns:
      alpha [n]: alpha_i = 1 + (n - i) / sum_j>=i log(e_j / e_i).
      distance [n]: Kolmogorov-Smirnov distance between the power law and the tail.
    """
    chex.assert_rank(e, 1)
    chex.assert_type(e, jnp.float32)
    n, log = len(e), jnp.log(e)

    def fit(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        tail, size = jnp.arange(n) >= i, (n - i).astype(jnp.float32)
        alpha = 1 + size / jnp.sum(jnp.where(tail, log - log[i], 0))
        below = (jnp.arange(n) - i).astype(jnp.float32) / size
        distance = jnp.abs(1 - jnp.exp((log - log[i]) * (1 - alpha)) - below)
        return alpha, jnp.max(jnp.where(tail, distance, 0))

    with jax.named_scope("fit_power_laws"):
        return jax.lax.map(fit, jnp.arange(n), batch_size=BATCH)


def tail_limits(e: np.ndarray, official: bool) -> tuple[float, float]:
    """Return the least and the greatest eigenvalue where a tail may begin.

    Both lie around the peak of the spectrum on a log scale.

    Args:
      e: Eigenvalues, ascending and positive, [n].
      official: Take the lower limit of the authors' code.
    """
    logs = np.log10(e)
    counts, edges = np.histogram(logs, BINS, (logs.min(), logs.max()))
    peak = 10 ** float(edges[np.argmax(counts)])
    # The official code takes the logarithm of the lower limit, which then mostly is none.
    lower = np.log10(0.95 * peak) if official else 0.95 * peak
    return lower, 1.5 * peak


def best_exponent(e: np.ndarray, alpha: np.ndarray, distance: np.ndarray, official: bool) -> float:
    """Return the exponent of the tail that a power law fits best.

    Args:
      e: Eigenvalues, ascending and positive, [n].
      alpha: Exponent of the tail that begins at each, [n].
      distance: Distance of its power law, [n].
      official: Bound where the tail begins as the authors' code does.
    """
    least, most = tail_limits(e, official)
    # A tail of one eigenvalue is fitted by any power law.
    more_than_one = np.arange(len(e)) < len(e) - 1
    allowed = (e >= least) & (e <= most) & (alpha > 1) & more_than_one
    return float(alpha[np.argmin(np.where(allowed, distance, 1.0))])


def block_fractions(exponents: np.ndarray, sparsity: float, epsilon: float) -> np.ndarray:
    """Return fractions to remove that are linear in the exponents.

    Source: Lu et al. 2024, eq. 3.

    Args:
      exponents: Mean exponent of each block, [blocks].
      sparsity: Fraction of a block in the middle.
      epsilon: The most removed is (1 + epsilon) / (1 - epsilon) times the least.

    Returns:
      Fractions [blocks]; their mean is not yet the sparsity.
    """
    span = np.ptp(exponents)
    if span == 0:
        return np.full(len(exponents), sparsity)
    factor = 1 - epsilon + (exponents - exponents.min()) / span * 2 * epsilon
    return sparsity * factor
