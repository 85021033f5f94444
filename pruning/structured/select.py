"""Which units stay: from scores and a fraction to one keep mask a block. On the host; nothing here is large."""

import math
from collections.abc import Sequence

import numpy as np

Keeps = list[np.ndarray]  # bool [units], True stays


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """True but for the `count` lowest scores; of equal ones the first go."""
    keep = np.ones(len(scores), bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


def local(scores: Sequence[np.ndarray], fraction: float) -> Keeps:
    """The same fraction of every block's units: `round(fraction * units)`, halves to even, as `torch.nn.utils.prune` counts."""
    return [lowest(s, round(fraction * len(s))) for s in scores]


def global_(scores: Sequence[np.ndarray], fraction: float, costs: Sequence[float]) -> Keeps:
    """The lowest units of all blocks together, until the fraction of all parameters is removed, to the nearest unit.

    Args:
      scores: [units] a block, comparable between blocks.
      costs: parameters that one unit of each block holds.
    The best unit of every block stays: a block without any cannot be stored.
    """
    flat = np.concatenate(scores)
    cost = np.repeat(np.asarray(costs, np.float64), [len(s) for s in scores])
    ends = np.cumsum([len(s) for s in scores])
    best = [end - len(s) + int(np.argmax(s)) for end, s in zip(ends, scores, strict=True)]
    order = np.argsort(flat, kind="stable")
    order = order[~np.isin(order, best)]
    removed = np.concatenate([[0.0], np.cumsum(cost[order])])
    keep = np.ones(len(flat), bool)
    keep[order[: int(np.argmin(np.abs(removed - fraction * cost.sum())))]] = False
    return np.split(keep, ends[:-1])


def within(scores: Sequence[np.ndarray], fraction: float, spread: float) -> list[np.ndarray]:
    """The scores so changed that `global_` takes from each block a fraction that differs from `fraction` by at most `spread`.

    Units that a block must lose come first, those that it must keep last.
    """
    found = []
    for s in scores:
        order, bounded = np.argsort(s, kind="stable"), s.astype(np.float64)
        least, most = (
            min(max(round((fraction + d) * len(s)), 0), len(s)) for d in (-spread, spread)
        )
        bounded[order[:least]], bounded[order[most:]] = -np.inf, np.inf
        found.append(bounded)
    return found


def global_by_count(scores: Sequence[np.ndarray], fraction: float) -> Keeps:
    """The `ceil(fraction * units)` lowest units of all lists together, whatever they cost: LLM-Rank's GlobalPruner. A list may lose all."""
    flat = np.concatenate(scores)
    return np.split(
        lowest(flat, math.ceil(len(flat) * fraction)), np.cumsum([len(s) for s in scores])[:-1]
    )


def rounded(scores: Sequence[np.ndarray], keeps: Keeps, to: int) -> Keeps:
    """The keeps with each list's number of kept units the nearest multiple of `to` (at least one multiple, at most all): what hardware
    multiplies well. The best that had gone come back, or the worst that stayed go. A list of which all stay is not touched, nor with `to` 0
    any."""
    if not to:
        return keeps
    found = []
    for s, keep in zip(scores, keeps, strict=True):
        count = len(s) if keep.all() else min(len(s), max(1, round(int(keep.sum()) / to)) * to)
        # Kept before gone, each by score: the order in which units would leave.
        leaving = np.lexsort((np.arange(len(s)), s, keep))
        new = np.ones(len(s), bool)
        new[leaving[: len(s) - count]] = False
        found.append(new)
    return found
