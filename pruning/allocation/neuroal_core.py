"""NeuroAL (Cunegatti et al. 2025), maths: misalignment of activations, and fractions from it.

Activations are summed up by norms a [c]: the L2 norm of every channel over the calibration tokens.
"""

import chex
import numpy as np

from pruning.budget_core import (
    MAX_FRACTION,
    MIN_FRACTION,
    fraction_for_count,
    fractions_from_scores,
)


def misalignment(dense: np.ndarray, sparse: np.ndarray) -> float:
    """Return how differently dense and pruned activity is shared between channels.

    |a / sum(a) - a' / sum(a')|_2 / c. Source: Cunegatti et al. 2025, eq. 2.

    Args:
      dense: Norms a of the dense model, [c].
      sparse: Norms a' of the pruned one, [c].
    """
    chex.assert_rank([dense, sparse], 1)
    chex.assert_equal_shape([dense, sparse])

    def share(a: np.ndarray) -> np.ndarray:
        total = a.sum()
        # An input that is all zero has no shares, and NaN would spoil the whole score.
        return a / total if total > 0 else np.zeros_like(a)

    return float(np.linalg.norm(share(dense) - share(sparse)) / len(dense))


def schedule(blocks: int, sparsity: float, lam: float) -> np.ndarray:
    """Return fractions to remove that grow evenly from block to block.

    Source: Cunegatti et al. 2025, eq. 3.

    Args:
      blocks: Number of blocks.
      sparsity: Mean of the fractions.
      lam: The first block loses sparsity - lam, the last sparsity + lam.

    Returns:
      Fractions [blocks].
    """
    # Through the formula of scores, not a linspace: the last bits of a fraction decide how many
    # entries go, and they follow the order of operations.
    return fractions_from_scores(np.arange(blocks)[::-1], sparsity, lam)


def row_fractions(norm_drop: np.ndarray, sparsity: float, lam: float) -> np.ndarray:
    """Return fractions to remove that are lowest where a channel lost most activity.

    Source: Cunegatti et al. 2025, eq. 4.

    Args:
      norm_drop: Dense less pruned norm of each row's channel, [rows].
      sparsity: Mean of the fractions.
      lam: Half the distance between the lowest and the highest density.

    Returns:
      Fractions [rows]; even where the drops sum to zero, as in the official code.
    """
    chex.assert_rank(norm_drop, 1)
    # Drops have signs. The official test is on their sum, so drops that cancel count as none.
    scores = norm_drop if norm_drop.sum() else np.zeros_like(norm_drop)
    return fractions_from_scores(scores, sparsity, lam)


def kept_row_fractions(fractions: np.ndarray, columns: int) -> np.ndarray:
    """Round row fractions as the official code does, which truncates what a row keeps.

    Args:
      fractions: Fractions to remove, [rows].
      columns: Inputs of a row.

    Returns:
      Fractions [rows] that stand for whole entries.
    """
    # Truncates what stays: 0.7 of 256 removes 180 entries, where a block step removes 179.
    density = 1 - np.clip(fractions, MIN_FRACTION, MAX_FRACTION)
    return fraction_for_count(columns - np.trunc(density * columns), columns)


def mean_over_shared_heads(norm_drop: np.ndarray, queries: int, width: int) -> np.ndarray:
    """Average channels over the query heads that share a key-value head.

    Args:
      norm_drop: Drop of each channel, [heads * width], heads that share one side by side.
      queries: Query heads that share one key-value head.
      width: Channels of a head.

    Returns:
      Means [heads / queries * width].
    """
    return norm_drop.reshape(-1, queries, width).mean(1).reshape(-1)
