"""Search for the smallest sparsity whose cost meets a limit, and keep what was tried."""

import dataclasses
import math
from collections.abc import Callable

MOST_DIGITS = 8
GRID = 16  # tried to find the interval of sparsities that a method takes
# Sparsities at which a method that removes units or blocks removes some, as far as it takes them.
PROBES = (0.5, 0.25, 0.1, 0.05)


@dataclasses.dataclass(frozen=True)
class Search:
    """Result of a search.

    Attributes:
      sparsity: Smallest sparsity that meets the limit, in as few digits as possible; None if none
        does.
      cost: Its cost; without one, the lowest cost that there is.
      tried: (sparsity, cost) in the order of the trials, each cost once.
      nearest: Sparsity of `cost`.
    """

    sparsity: float | None
    cost: float
    tried: tuple[tuple[float, float], ...]
    nearest: float


class _Trials:
    """Costs of the sparsities that were tried."""

    def __init__(self, cost: Callable[[float], float]) -> None:
        self._cost = cost
        self._known: dict[float, float] = {}

    def __call__(self, sparsity: float) -> float:
        if sparsity not in self._known:
            self._known[sparsity] = self._cost(sparsity)
        return self._known[sparsity]

    def tried(self, chosen: float) -> tuple[tuple[float, float], ...]:
        """Return the trials, of those with one cost the first, or the chosen one."""
        first: dict[float, float] = {}
        for sparsity, cost in self._known.items():
            first.setdefault(cost, sparsity)
        first[self(chosen)] = chosen
        return tuple((sparsity, cost) for cost, sparsity in first.items())


def search(
    cost: Callable[[float], float],
    accepts: Callable[[float], bool],
    limit: float,
    resolution: float,
) -> Search:
    """Find the smallest sparsity whose cost is at most the limit.

    Args:
      cost: Sparsity, 0 <= s < 1 -> cost, which falls in steps.
      accepts: Returns whether a sparsity can be asked for: those of one interval can, and 0.
      limit: Most that the cost may be.
      resolution: Largest difference of sparsities that is not looked into.

    Returns:
      The sparsity and the trials.
    """
    trials = _Trials(cost)
    low, high = _ends(accepts, resolution)
    if trials(low) <= limit:
        return Search(low, trials(low), trials.tried(low), low)
    if trials(high) > limit:
        return Search(None, trials(high), trials.tried(high), high)
    step = 0
    while high - low > resolution:
        # Costs are almost linear, but for their steps: a line through the ends, then halves.
        above, below = trials(low), trials(high)
        share = (above - limit) / (above - below) if step % 2 == 0 else 0.5
        middle = low + (high - low) * min(max(share, 0.01), 0.99)
        low, high = (low, middle) if trials(middle) <= limit else (middle, high)
        step += 1
    best = _shortest(trials, low, high)
    return Search(best, trials(best), trials.tried(best), best)


def _ends(accepts: Callable[[float], bool], resolution: float) -> tuple[float, float]:
    """Return the smallest and the largest sparsity that can be asked for, to the resolution."""
    candidates = [resolution, *(k / GRID for k in range(1, GRID)), 1.0 - resolution]
    accepted = [k for k, sparsity in enumerate(candidates) if accepts(sparsity)]
    if not accepted:
        return 0.0, 0.0
    first, last = accepted[0], accepted[-1]
    low, high = candidates[first], candidates[last]
    # Below the first probe is the dense model.
    low = _edge(accepts, low, candidates[first - 1], resolution) if first else 0.0
    if last + 1 < len(candidates):
        high = _edge(accepts, high, candidates[last + 1], resolution)
    return low, high


def _edge(
    accepts: Callable[[float], bool], inside: float, outside: float, resolution: float
) -> float:
    """Return the sparsity that can be asked for next to one that cannot, to the resolution."""
    while abs(outside - inside) > resolution:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if accepts(middle) else (inside, middle)
    return inside


def _shortest(trials: _Trials, low: float, high: float) -> float:
    """Return the sparsity above `low` with the fewest digits and the cost of `high`."""
    for digits in range(1, MOST_DIGITS):
        short = math.ceil(high * 10**digits) / 10**digits
        if low < short < 1 and trials(short) == trials(high):
            return short
    return high
