"""Minitron's scores and the factors of norms in float64 NumPy, from arXiv 2407.14679."""

from collections.abc import Sequence

import numpy as np


def unit_scores(windows: np.ndarray, width: int) -> np.ndarray:
    """Return the score of each unit of x [windows tokens units*width]."""
    c = windows.shape[-1]
    scores = np.zeros(c // width)
    for x in windows.astype(np.float64):
        norms = [[np.linalg.norm(token[u : u + width]) for u in range(0, c, width)] for token in x]
        scores += np.mean(norms, axis=0) ** 2
    return np.sqrt(scores)


def channel_scores(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of each channel from the outputs of all norms [windows tokens d]."""
    return sum(unit_scores(y, 1) for y in outputs)


def norm_gain(x: np.ndarray, keep: np.ndarray) -> float:
    """Return the factor for a norm over the kept channels of x [... d]."""
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    shares = (flat[:, keep] ** 2).sum(axis=1) / (flat**2).sum(axis=1)
    return float(np.sqrt(shares.mean() * len(keep) / keep.sum()))
