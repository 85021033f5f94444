"""NeuroAL (Cunegatti et al. 2025), maths: how far pruned activations are from dense ones, and sparsities that follow from it.

Activations are told by their norms: a [c], the L2 norm of every channel over the calibration tokens.
"""

import numpy as np

from pruning.budget import spread


def misalignment(dense: np.ndarray, sparse: np.ndarray) -> float:
    """|a / sum(a) - a' / sum(a')|_2 / c for norms a, a' [c] (eq. 2): how differently activity is shared out between the channels."""

    def share(a: np.ndarray) -> np.ndarray:
        total = a.sum()
        return a / total if total > 0 else np.zeros_like(a)

    return float(np.linalg.norm(share(dense) - share(sparse)) / len(dense))


def schedule(blocks: int, sparsity: float, lam: float) -> np.ndarray:
    """What each block loses [blocks]: evenly from sparsity - lam in the first to sparsity + lam in the last (eq. 3)."""
    return spread(np.arange(blocks)[::-1], sparsity, lam)


def row_fractions(lost: np.ndarray, sparsity: float, lam: float) -> np.ndarray:
    """What each row loses [rows]: the row whose channel lost most activity to pruning keeps most (eq. 4).

    Args:
      lost: by how much the dense norm of each row's channel exceeds the pruned one [rows]; with a sum of zero, rows stay even.
      sparsity: the rows' mean; their densities span 2 lam.
    """
    return spread(lost if lost.sum() else np.zeros_like(lost), sparsity, lam)
