"""FLAP's statistics as the official code computes them, in float64 NumPy, sample by sample."""

import numpy as np


def official(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the fluctuation [c] of samples x [n t c].

    Deviations are taken from a mean that has the sample in it already.
    """
    mean, fluctuation = np.zeros(x.shape[-1]), np.zeros(x.shape[-1])
    for n, sample in enumerate(x.astype(np.float64)):
        mean = mean * n / (n + 1) + sample.mean(axis=0) / (n + 1)
        fluctuation = (
            fluctuation * (n - 1) / n + ((sample - mean) ** 2).sum(axis=0) / (n + 1)
            if n
            else fluctuation * 0
        )
    return mean, fluctuation


def refit(w: np.ndarray, x: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit weights and a bias on the kept columns of x [tokens in] to w x, by least squares."""
    a = np.concatenate([x[:, keep], np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(a, x @ w.T, rcond=None)[0]
    new = np.zeros_like(w)
    new[:, keep] = solution[:-1].T
    return new, solution[-1]
