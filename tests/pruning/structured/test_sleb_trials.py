"""Trials of SLEB on bounds given by hand: limits, estimates, and losses that are not finite."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pruning.structured.sleb_paths import Candidate, Piece
from pruning.structured.sleb_runner import Runner
from pruning.structured.sleb_trials import Trial, try_candidates


class ListedBounds:
    """A runner whose bounds are listed by the first block of a candidate."""

    bounds_per_loss = 3

    def __init__(self, bounds: Mapping[int, Sequence[float]]) -> None:
        self.bounds = bounds
        self.read = dict.fromkeys(bounds, 0)

    def loss_bounds(self, candidate: Candidate) -> Iterator[float]:
        unit = candidate.path[0].block
        for bound in self.bounds[unit]:
            self.read[unit] += 1
            yield bound


def trials(
    bounds: Mapping[int, Sequence[float]], needed: int = 1, stop_early: bool = True
) -> tuple[dict[int, Trial], dict[int, int]]:
    """Return the trials, and the number of bounds that each of them read."""
    runner: Any = ListedBounds(bounds)
    candidates = {u: Candidate((Piece(u),), 0) for u in bounds}
    advanced: list[None] = []
    result = try_candidates(
        cast(Runner, runner), candidates, needed, stop_early, lambda: advanced.append(None)
    )
    assert len(advanced) == len(bounds)
    return result, runner.read


def test_a_candidate_is_stopped_above_the_lowest_loss() -> None:
    """Its loss is estimated from the bounds of the first one: 5 of 3 where that had 2 of 3."""
    result, read = trials({0: [1, 2, 3], 1: [2, 5, 6], 2: [0, 1, 2]})
    assert result == {0: Trial(3, None, 3), 1: Trial(None, 3, 7.5), 2: Trial(2, None, 2)}
    assert read == {0: 3, 1: 2, 2: 3}


def test_every_loss_is_computed_without_stopping() -> None:
    result, _ = trials({0: [1, 2, 3], 1: [2, 5, 6]}, stop_early=False)
    assert [trial.loss for trial in result.values()] == [3, 6]


def test_the_limit_is_the_highest_of_the_losses_needed() -> None:
    result, _ = trials({0: [1, 2, 3], 1: [2, 5, 6], 2: [2, 4, 7], 3: [7, 8, 9]}, needed=2)
    assert [trial.stopped_at for trial in result.values()] == [None, None, None, 6]
    assert result[2].loss == 7, "its last bound is its loss"


def test_a_loss_that_is_not_finite_ends_a_trial_at_once() -> None:
    """It stops no other candidate, and is no reference for estimates."""
    result, read = trials({0: [math.nan, 1, 1], 1: [1, 2, 3], 2: [1, math.inf, 1]})
    assert result[0] == Trial(None, None, math.inf) == result[2]
    assert result[1].loss == 3 and read == {0: 1, 1: 3, 2: 2}
