"""Selection of units against brute force: counts, budgets, ties, and units that always stay."""

import itertools
import math

import numpy as np
import pytest

from pruning.structured import select_core

FRACTIONS = (0.0, 0.1, 0.25, 0.3, 0.5, 0.77, 0.99)
RAGGED = [np.random.default_rng(i).random(size) for i, size in enumerate((7, 12, 1, 5))]
TIED = [np.array([1.0, 1.0, 0.0, 2.0]), np.array([1.0, 1.0, 1.0]), np.array([0.0, 2.0, 2.0])]
COSTS = [3.0, 1.0, 10.0, 2.5]


def counts(keeps: list[np.ndarray]) -> list[int]:
    """Return the number of units removed from each list."""
    return [int((~k).sum()) for k in keeps]


def drops_lowest(scores: list[np.ndarray], keeps: list[np.ndarray]) -> bool:
    """Return whether every list keeps its highest scores, and of equal ones the later."""
    order = [sorted(range(len(s)), key=lambda i, s=s: (s[i], i)) for s in scores]
    return all(
        set(np.flatnonzero(~k)) == set(o[: (~k).sum()]) for k, o in zip(keeps, order, strict=True)
    )


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("scores", [RAGGED, TIED], ids=["ragged", "tied"])
def test_per_block_selection_removes_the_rounded_share_of_each(
    scores: list[np.ndarray], fraction: float
) -> None:
    keeps = select_core.select_lowest_per_block(scores, fraction)
    assert counts(keeps) == [round(fraction * len(s)) for s in scores]
    assert drops_lowest(scores, keeps)


@pytest.mark.parametrize(
    ("units", "fraction", "want"),
    [(704, 0.3, 211), (256, 0.3, 77), (1536, 0.3, 461), (576, 0.3, 173), (5, 0.5, 2), (7, 0.5, 4)],
)
def test_per_block_selection_counts_as_torch_does(units: int, fraction: float, want: int) -> None:
    """Halves round to even; the first four counts are from LLM-Rank's official code."""
    assert counts(
        select_core.select_lowest_per_block([np.arange(units, dtype=float)], fraction)
    ) == [want]


def brute_force(scores: list[np.ndarray], fraction: float, costs: list[float]) -> float:
    """Return the smallest miss of the budget over all numbers of lowest units; each best stays."""
    units = [
        (s[i], cost)
        for s, cost in zip(scores, costs, strict=True)
        for i in range(len(s))
        if i != int(np.argmax(s))
    ]
    target = fraction * sum(cost * len(s) for s, cost in zip(scores, costs, strict=True))
    spent = itertools.accumulate(
        (cost for _, cost in sorted(units, key=lambda unit: unit[0])), initial=0.0
    )
    return min(abs(total - target) for total in spent)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("costs", [[1.0] * 4, COSTS], ids=["units", "parameters"])
def test_overall_selection_meets_the_budget_to_the_nearest_unit(
    costs: list[float], fraction: float
) -> None:
    keeps = select_core.select_lowest_overall(RAGGED, fraction, costs)
    target = fraction * sum(c * len(s) for c, s in zip(costs, RAGGED, strict=True))
    miss = abs(sum(c * n for c, n in zip(costs, counts(keeps), strict=True)) - target)
    assert miss == pytest.approx(brute_force(RAGGED, fraction, costs), abs=1e-9)
    assert drops_lowest(RAGGED, keeps)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_overall_selection_removes_the_lowest_of_all_lists(fraction: float) -> None:
    """Apart from each list's best, no kept unit is below a removed one."""
    keeps = select_core.select_lowest_overall(RAGGED, fraction, [1.0] * 4)
    removed = [s[~k].max(initial=-np.inf) for s, k in zip(RAGGED, keeps, strict=True)]
    kept = [
        np.delete(s, np.argmax(s))[np.delete(k, np.argmax(s))].min(initial=np.inf)
        for s, k in zip(RAGGED, keeps, strict=True)
    ]
    assert max(removed) < min(kept)


@pytest.mark.parametrize(
    "scores",
    [RAGGED, TIED, [np.zeros(4), np.ones(4)]],
    ids=["ragged", "tied", "a list below all others"],
)
def test_the_best_unit_of_every_list_stays(scores: list[np.ndarray]) -> None:
    keeps = select_core.select_lowest_overall(scores, 0.99, [1.0] * len(scores))
    assert all(k[np.argmax(s)] for k, s in zip(keeps, scores, strict=True))
    assert counts(keeps) == [len(s) - 1 for s in scores]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("scores", [RAGGED, TIED], ids=["ragged", "tied"])
def test_selection_by_count_cuts_one_sorted_list(scores: list[np.ndarray], fraction: float) -> None:
    keeps = select_core.select_lowest_by_count(scores, fraction)
    ranked = sorted((value, i, j) for i, s in enumerate(scores) for j, value in enumerate(s))
    removed = {(i, j) for _, i, j in ranked[: math.ceil(len(ranked) * fraction)]}
    assert {(i, int(j)) for i, k in enumerate(keeps) for j in np.flatnonzero(~k)} == removed


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.95])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.25, 1.0])
def test_clamped_scores_bound_the_share_of_every_list(spread: float, fraction: float) -> None:
    scores = [np.random.default_rng(i).random(40) * 4**i for i in range(4)]
    free = select_core.select_lowest_overall(scores, fraction, [1.0] * 4)
    keeps = select_core.select_lowest_overall(
        select_core.clamp_to_band(scores, fraction, spread), fraction, [1.0] * 4
    )
    assert drops_lowest(scores, keeps)
    assert sum(counts(keeps)) == sum(counts(free))
    for count in counts(keeps):
        assert abs(count / 40 - fraction) <= spread + 1e-9
    assert (counts(keeps) == counts(free)) == (
        spread == 1 or max(abs(c / 40 - fraction) for c in counts(free)) <= spread
    )


def test_selection_by_count_may_empty_a_list() -> None:
    """As in LLM-Rank's official code: a linear may lose all its rows."""
    assert counts(select_core.select_lowest_by_count([np.zeros(3), np.ones(3)], 0.5)) == [3, 0]


def test_ties_are_removed_in_order() -> None:
    """Of equal scores the first unit of the first list is removed first, on every machine."""
    assert [k.tolist() for k in select_core.select_lowest_by_count(TIED, 0.5)] == [
        [False, False, False, True],
        [False, True, True],
        [False, True, True],
    ]
    # The best unit of each list is its first maximum: the middle list has only two others to lose.
    assert [k.tolist() for k in select_core.select_lowest_overall(TIED, 0.4, [1.0] * 3)] == [
        [False, False, False, True],
        [True, True, True],
        [False, True, True],
    ]


def test_selection_leaves_the_scores_alone() -> None:
    before = [s.copy() for s in RAGGED]
    (
        select_core.select_lowest_per_block(RAGGED, 0.5),
        select_core.select_lowest_overall(RAGGED, 0.5, COSTS),
        select_core.select_lowest_by_count(RAGGED, 0.5),
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, RAGGED, strict=True))


@pytest.mark.parametrize(
    ("to", "want"), [(0, [3, 8, 5]), (4, [4, 8, 4]), (3, [3, 9, 6]), (16, [10, 10, 10])]
)
def test_numbers_of_kept_units_are_rounded_to_the_nearest_multiple(
    to: int, want: list[int]
) -> None:
    """At least one multiple and at most all; the best come back, the worst are dropped."""
    scores = [np.random.default_rng(i).permutation(10).astype(float) for i in range(3)]
    keeps = [s >= 10 - k for s, k in zip(scores, (3, 8, 5), strict=True)]
    got = select_core.round_kept(scores, keeps, to)
    assert counts(got) == [10 - w for w in want] or [int(k.sum()) for k in got] == want
    assert drops_lowest(scores, got)


def test_rounding_leaves_a_whole_list_whole() -> None:
    assert [
        int(k.sum())
        for k in select_core.round_kept(
            [np.arange(10.0)] * 2, [np.ones(10, bool), np.arange(10) > 3], 4
        )
    ] == [10, 8]
