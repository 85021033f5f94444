"""SparseGPT in float64 NumPy: H inverted, then one column after the other.

Source: Frantar & Alistarh 2023, Algorithm 1. An error is spread over all later columns at once,
which equals the paper's lazy batches. Masks are True where the entry is removed.
"""

import numpy as np

BLOCK = 128  # columns under one threshold


def upper_factor(h: np.ndarray, damp: float) -> np.ndarray:
    """Return the upper U with U^T U = H^-1, of damped H [c c] with 1 for dead inputs."""
    h = h.astype(np.float64)
    for i in range(len(h)):
        if h[i, i] == 0:
            h[i, i] = 1.0
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T


def chosen(score: np.ndarray, start: int, fraction: float | np.ndarray) -> np.ndarray:
    """Return the removed entries of the block of columns at `start`, score [rows columns].

    With one fraction: all up to the entry at rank int(rows * columns * fraction), that entry and
    its ties included. With a fraction for every row: as many of its lowest as make int(columns so
    far * fraction).
    """
    removed = np.zeros(score.shape, bool)
    if np.ndim(fraction) == 0:
        return score <= sorted(score.ravel())[int(score.size * float(fraction))]
    for row, f in enumerate(np.asarray(fraction)):
        count = int((start + score.shape[1]) * f) - int(start * f)
        removed[row, np.argsort(score[row], kind="stable")[:count]] = True
    return removed


def lowest_of_groups(score: np.ndarray, n: int) -> np.ndarray:
    """Return the n lowest of each row."""
    removed = np.zeros(score.shape, bool)
    for row, values in enumerate(score):
        removed[row, np.argsort(values)[:n]] = True
    return removed


def solve(
    w: np.ndarray,
    h: np.ndarray,
    fraction: float | np.ndarray,
    pattern: tuple[int, int] | None = None,
    damp: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (W [out in], removed bool [out in]) of one linear whose inputs have H [in in]."""
    w, u = w.astype(np.float64), upper_factor(h, damp)
    removed = np.zeros(w.shape, bool)
    w[:, np.diag(h) == 0] = 0.0
    for i in range(w.shape[1]):
        width = pattern[1] if pattern else BLOCK
        if i % width == 0:
            part = slice(i, i + width)
            score = w[:, part] ** 2 / np.diag(u)[part] ** 2
            removed[:, part] = (
                lowest_of_groups(score, pattern[0]) if pattern else chosen(score, i, fraction)
            )
        error = np.where(removed[:, i], w[:, i], 0.0) / u[i, i]
        for j in range(i + 1, w.shape[1]):
            w[:, j] -= error * u[i, j]
        w[removed[:, i], i] = 0.0
    return w, removed | (np.diag(h) == 0)
