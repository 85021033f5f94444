"""RIA's score in float64 NumPy, entry by entry.

Source: Zhang et al. 2024, eq. 4 and 5.
"""

import numpy as np


def score(w: np.ndarray, scaler: np.ndarray, power: float) -> np.ndarray:
    """Return (|W_ij| / sum of column j + |W_ij| / sum of row i) * ||X_j||^power, [out in].

    `scaler` has the squared norms of the inputs, [in].
    """
    size = np.abs(w.astype(np.float64))
    found = np.zeros(size.shape)
    for i in range(len(size)):
        for j in range(size.shape[1]):
            relative = size[i, j] / sum(size[:, j]) + size[i, j] / sum(size[i, :])
            found[i, j] = relative * float(scaler[j]) ** (power / 2)
    return found
