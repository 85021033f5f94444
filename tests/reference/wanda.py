"""Magnitude pruning and Wanda in float64 NumPy: running means and sorting, entry by entry.

Source: Sun et al. 2024. Masks are True where the entry is removed, as in the official code.
"""

from collections.abc import Iterable

import numpy as np


def scaler_row(samples: Iterable[np.ndarray]) -> np.ndarray:
    """Return the running mean over samples of each channel's squared norm over the tokens.

    A sample is [tokens channels].
    """
    mean = np.zeros(1)
    for n, x in enumerate(samples):
        mean = mean * n / (n + 1) + np.linalg.norm(x.astype(np.float64), axis=0) ** 2 / (n + 1)
    return mean


def score(w: np.ndarray, scaler: np.ndarray) -> np.ndarray:
    """Return |W_ij| * ||X_j||, [out in]."""
    return np.array(
        [[abs(float(entry)) * np.sqrt(scaler[j]) for j, entry in enumerate(row)] for row in w]
    )


def removed_per_row(score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the `counts[i]` lowest entries of row i, of equal ones the leftmost."""
    removed = np.zeros(score.shape, bool)
    for i, row in enumerate(score):
        removed[i, sorted(range(len(row)), key=lambda j, row=row: (row[j], j))[: counts[i]]] = True
    return removed


def removed_per_matrix(score: np.ndarray, fraction: float) -> np.ndarray:
    """Return everything up to the entry at rank `int(size * fraction)`, ties included."""
    return score <= sorted(score.ravel())[int(score.size * fraction)]


def removed_n_of_m(score: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return the n lowest of every m consecutive inputs, of equal ones the rightmost."""
    removed = np.zeros(score.shape, bool)
    for i, row in enumerate(score):
        for start in range(0, len(row), m):
            group = sorted(range(start, start + m), key=lambda j, row=row: (row[j], -j))
            removed[i, group[:n]] = True
    return removed
