"""Fractions to remove, as arrays: spread by scores, clipped, and made to meet a sparsity exactly.

Everything is NumPy in float64 on the host: float32 rounding would move whole entries.
"""

import numpy as np

# Bounds of what a linear or a row loses, where the whole model loses a fraction between them.
MIN_FRACTION, MAX_FRACTION = 0.01, 0.99
# Halvings that bring an interval of length 3 or less to the last bit of a float64.
HALVINGS = 60


def fractions_from_scores(scores: np.ndarray, sparsity: float, lam: float) -> np.ndarray:
    """Return fractions to remove whose densities are linear in scores.

    Source: Yin et al. 2024, section 3.2; Cunegatti et al. 2025, eq. 3 and 4.

    Args:
      scores: Importance of each block or row, [n].
      sparsity: Mean of the fractions.
      lam: Half the distance between the lowest and the highest density.

    Returns:
      Fractions [n], not bounded.
    """
    scores = scores.astype(np.float64)
    span = np.ptp(scores)
    if span == 0:
        return np.full(len(scores), sparsity, np.float64)
    # The order of operations of the official code: its last bits decide how many whole entries a
    # fraction stands for.
    density = (scores - scores.min()) * (1 / span * lam * 2)
    return 1 - (density - density.mean() + (1 - sparsity))


def clip_fractions(fractions: np.ndarray) -> np.ndarray:
    """Clip fractions [n] as the official code of OWL and NeuroAL does.

    0.01 stands for what is not above 0, and 0.99 for what is not below 1; others stay.
    """
    low = fractions <= 0
    high = fractions >= 1
    return np.where(low, MIN_FRACTION, np.where(high, MAX_FRACTION, fractions))


def fraction_for_count(count: np.ndarray, total: np.ndarray | int) -> np.ndarray:
    """Return the least fraction that patterns turn back into a count.

    Args:
      count: Whole numbers, [n].
      total: What they are counts of, [n] or one number.

    Returns:
      Float64 fractions [n] with int(fraction * total) == count.
    """
    fraction = np.asarray(count, np.float64) / total
    # Division may round down, and truncation would then lose a whole entry.
    too_low = (fraction * total).astype(np.int64) < count
    return np.where(too_low, np.nextafter(fraction, 2), fraction)


def shift_to_sparsity(
    fractions: np.ndarray, columns: np.ndarray, weights: np.ndarray, sparsity: float
) -> np.ndarray:
    """Move all fractions by the same amount, so that they meet the sparsity within bounds.

    Args:
      fractions: Fractions [n], not bounded.
      columns: Inputs of each unit, [n].
      weights: Rows of each unit, [n].
      sparsity: Mean to meet, over all weights.

    Returns:
      Bounded fractions [n].
    """
    sizes = columns * weights
    total = sizes.sum()
    # A sparsity beyond the bounds moves them.
    least = min(MIN_FRACTION, sparsity)
    # Whole entries, and at least one of a row stays.
    whole = np.floor(max(MAX_FRACTION, sparsity) * columns)
    most = np.minimum(whole, columns - 1) / columns
    low, high = -1.0 - fractions.max(), 1.0 - fractions.min()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mean = np.sum(np.clip(fractions + middle, least, most) * sizes) / total
        if mean < sparsity:
            low = middle
        else:
            high = middle
    return np.clip(fractions + high, least, most)


def whole_counts(
    fractions: np.ndarray, columns: np.ndarray, weights: np.ndarray, sparsity: float
) -> np.ndarray:
    """Return whole entries to remove that meet the sparsity to one unit.

    What rounding down leaves over goes to the units of largest remainder (Hare's quota).

    Args:
      fractions: Bounded fractions [n] that meet the sparsity.
      columns: Inputs of each unit, [n].
      weights: Rows of each unit, [n].
      sparsity: Fraction to remove of all weights.

    Returns:
      Entries to remove from each row of a unit, int64 [n].
    """
    quota = fractions * columns
    # A product a few bits below a whole number is that number.
    counts = np.floor(quota + 1e-9).astype(np.int64)
    left = round(sparsity * (columns * weights).sum()) - np.sum(counts * weights)
    order = np.argsort(counts - quota, kind="stable")
    order = order[counts[order] + 1 < columns[order]]
    fill = order[np.cumsum(weights[order]) <= left]
    counts[fill] += 1
    return counts
