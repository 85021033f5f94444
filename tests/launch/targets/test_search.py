"""The search for a sparsity: the smallest that meets the limit, on any falling steps."""

import numpy as np
import pytest

from launch.targets.search import search

RESOLUTION = 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_sparsity_that_meets_the_limit_is_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.uniform(0, 1, rng.integers(1, 400)))
    costs = 1000 - np.concatenate([[0], np.cumsum(rng.uniform(0.1, 2, len(edges)))])
    most = rng.uniform(0.8, 1.0)

    def cost(sparsity: float) -> float:
        return float(costs[np.searchsorted(edges, sparsity)])

    for limit in (costs[1], (costs[0] + costs[-1]) / 2, cost(most * 0.9)):
        if cost(most - 1e-5) > limit:
            continue
        found = search(cost, lambda s: s < most, limit, RESOLUTION)
        assert found.sparsity is not None and found.cost == cost(found.sparsity) <= limit
        # No step above it meets the limit: it is within one unit.
        below = costs[costs > found.cost]
        assert len(below) == 0 or below.min() > limit
        tried = dict(found.tried)
        assert tried[0.0] == costs[0] and len(tried) == len(set(tried.values()))
        assert all(value == cost(sparsity) for sparsity, value in found.tried)


def test_the_sparsity_has_as_few_digits_as_can_be() -> None:
    found = search(lambda s: 30 - round(30 * s), lambda s: True, 24, RESOLUTION)
    assert found.sparsity == 0.2 and found.cost == 24


def test_what_no_sparsity_meets_names_the_lowest_cost() -> None:
    found = search(lambda s: 100 * (1 - s), lambda s: s <= 0.6, 10, RESOLUTION)
    assert found.sparsity is None
    assert found.cost == pytest.approx(40, abs=1e-3) and found.nearest <= 0.6


def test_the_dense_model_may_meet_the_limit() -> None:
    found = search(lambda s: 100 * (1 - s), lambda s: True, 100, RESOLUTION)
    assert found.sparsity == 0 and found.tried == ((0.0, 100.0),)


def test_sparsities_below_what_a_method_takes_are_not_tried() -> None:
    """Such as those below the share that a narrower residual stream removes alone."""
    tried = []

    def cost(sparsity: float) -> float:
        tried.append(sparsity)
        return 100 * (1 - sparsity)

    found = search(cost, lambda s: 0.27 <= s <= 0.61, 50, RESOLUTION)
    assert found.sparsity == 0.5 and min(tried) >= 0.27
    assert search(cost, lambda s: 0.27 <= s <= 0.61, 80, RESOLUTION).sparsity == pytest.approx(
        0.27, abs=RESOLUTION
    )
