"""Select the units that stay: from scores and a fraction to one keep mask for each block.

Runs on the host in NumPy; a model has few units. Sorts are stable, so that ties fall alike on every
machine: of equal scores the first unit of the first block is removed first.
"""

import math
from collections.abc import Sequence

import chex
import numpy as np

Keeps = list[np.ndarray]  # by block: bool [units], True stays


def drop_lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the keep mask, bool [units], that drops the lowest scores.

    Args:
      scores: Score of each unit [units].
      count: Units to drop.
    """
    chex.assert_rank(scores, 1)
    keep = np.ones(len(scores), bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


def split_like(flat: np.ndarray, lists: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return an array over all units [total] as one array for each block.

    Args:
      flat: Values of all units, block after block [total].
      lists: By block: anything of its number of units [units].
    """
    return np.split(flat, np.cumsum([len(x) for x in lists])[:-1])


def select_lowest_per_block(scores: Sequence[np.ndarray], fraction: float) -> Keeps:
    """Drop the same fraction of every block's units.

    Args:
      scores: By block [units].
      fraction: Fraction of the units to drop, 0 <= fraction < 1.

    Returns:
      The units that stay, by block.
    """
    # Python rounds halves to even, which is also how `torch.nn.utils.prune` counts.
    return [drop_lowest(s, round(fraction * len(s))) for s in scores]


def select_lowest_overall(
    scores: Sequence[np.ndarray], fraction: float, costs: Sequence[float]
) -> Keeps:
    """Drop the lowest units of all blocks until `fraction` of the parameters is removed.

    The budget is met to the nearest unit. The best unit of every block stays.

    Args:
      scores: By block [units], comparable between blocks.
      fraction: Fraction of the parameters to remove.
      costs: By block: parameters that one of its units holds.

    Returns:
      The units that stay, by block.
    """
    chex.assert_equal(len(scores), len(costs))
    flat = np.concatenate(scores)
    cost = np.repeat(np.asarray(costs, np.float64), [len(s) for s in scores])
    ends = np.cumsum([len(s) for s in scores])
    # A block without any unit could not be stored: no format takes an empty matrix.
    best = [end - len(s) + int(np.argmax(s)) for end, s in zip(ends, scores, strict=True)]
    order = np.argsort(flat, kind="stable")
    order = order[~np.isin(order, best)]
    removed = np.concatenate([[0.0], np.cumsum(cost[order])])
    count = int(np.argmin(np.abs(removed - fraction * cost.sum())))
    keep = np.ones(len(flat), bool)
    keep[order[:count]] = False
    return split_like(keep, scores)


def select_lowest_by_count(scores: Sequence[np.ndarray], fraction: float) -> Keeps:
    """Drop the `ceil(fraction * units)` lowest units of all lists; a list may lose all.

    Source: `GlobalPruner` of LLM-Rank's official code.

    Args:
      scores: By list [units], comparable between lists.
      fraction: Fraction of all units to drop, whatever they cost.

    Returns:
      The units that stay, by list.
    """
    flat = np.concatenate(scores)
    # The official global pruner rounds up, the local one rounds halves to even.
    return split_like(drop_lowest(flat, math.ceil(len(flat) * fraction)), scores)


def clamp_to_band(
    scores: Sequence[np.ndarray], fraction: float, spread: float, both: bool = True
) -> list[np.ndarray]:
    """Clamp scores so that global selection removes `fraction` ± `spread` of every block.

    Args:
      scores: By block [units].
      fraction: Fraction of all units to drop.
      spread: Largest difference between the fraction that a block loses and `fraction`.
      both: False: a block may lose less, down to nothing.

    Returns:
      By block: scores, float64 [units], with -inf for units to drop in any case and inf for units
      to keep in any case.
    """
    clamped = []
    for s in scores:
        units = len(s)
        least = min(max(round((fraction - spread) * units), 0), units) if both else 0
        most = min(max(round((fraction + spread) * units), 0), units)
        order = np.argsort(s, kind="stable")
        bounded = s.astype(np.float64)
        # Infinities, so that one selection over the model keeps within the band by itself.
        bounded[order[:least]] = -np.inf
        bounded[order[most:]] = np.inf
        clamped.append(bounded)
    return clamped


def round_kept(scores: Sequence[np.ndarray], keeps: Keeps, multiple: int) -> Keeps:
    """Round the number of kept units of each block to a multiple.

    The best dropped units come back, or the worst kept units are dropped. A block that keeps all
    its units is left alone.

    Args:
      scores: By block [units].
      keeps: The units that stay, by block.
      multiple: Keep a multiple of this many units, at least one multiple and at most all; 0: off.

    Returns:
      The units that stay, by block.
    """
    if not multiple:
        return keeps
    rounded = []
    for s, keep in zip(scores, keeps, strict=True):
        chex.assert_equal_shape([s, keep])
        count = len(s)
        if not keep.all():
            count = min(count, max(1, round(int(keep.sum()) / multiple)) * multiple)
        rounded.append(keep_count(s, keep, count))
    return rounded


def keep_count(scores: np.ndarray, keep: np.ndarray, count: int) -> np.ndarray:
    """Return the keep mask, bool [units], of as many units as asked.

    The best dropped units come back, or the worst kept units are dropped.

    Args:
      scores: Score of each unit [units].
      keep: The units that stay now, bool [units].
      count: Units to keep.
    """
    # Dropped units first, each part by score: the order in which units are given up.
    order = np.lexsort((np.arange(len(scores)), scores, keep))
    new = np.ones(len(scores), bool)
    new[order[: len(scores) - count]] = False
    return new
