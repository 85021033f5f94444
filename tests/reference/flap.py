"""FLAP's statistics as its official code computes them, in float64 NumPy, a sample at a time."""

import numpy as np


def released(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and fluctuation, each [c], of samples x [n t c].

    The mean within the fluctuation already includes the sample, as in the official code.
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
    """Return (weights, bias) that predict w x best from the kept columns, by least squares.

    x is [tokens in], and the prediction [tokens out].
    """
    a = np.concatenate([x[:, keep], np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(a, x @ w.T, rcond=None)[0]
    new = np.zeros_like(w)
    new[:, keep] = solution[:-1].T
    return new, solution[-1]
