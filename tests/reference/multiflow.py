"""MULTIFLOW's score in float64 NumPy: an edge times the flow at both its ends.

Source: Farina et al. 2024, eq. 6.
"""

import numpy as np


def score(w: np.ndarray, scaler: np.ndarray) -> np.ndarray:
    """Return |W_ij| times the mean of row i and of column j of |W| ||X||, [out in].

    `scaler` has the squared norms of the inputs, [in].
    """
    rows, columns = w.shape
    edge = [
        [abs(float(w[i, j])) * float(scaler[j]) ** 0.5 for j in range(columns)] for i in range(rows)
    ]
    leaving = [sum(edge[i]) / columns for i in range(rows)]
    entering = [sum(edge[i][j] for i in range(rows)) / rows for j in range(columns)]
    return np.array(
        [
            [abs(float(w[i, j])) * leaving[i] * entering[j] for j in range(columns)]
            for i in range(rows)
        ]
    )
