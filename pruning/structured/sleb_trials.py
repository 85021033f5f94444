"""Try candidates one after the other, and stop those that cannot be the best."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pruning.structured.sleb_paths import Candidate
from pruning.structured.sleb_runner import Runner


class Trial(NamedTuple):
    """Result of trying a candidate.

    Attributes:
      loss: Loss, summed over windows; None if it was stopped or is not finite.
      stopped_at: Limit that it exceeded when it was stopped; None if it was not.
      estimate: Estimate of the whole loss from the part that is known.
    """

    loss: float | None
    stopped_at: float | None
    estimate: float


def try_candidate(
    runner: Runner, candidate: Candidate, limit: float, reference: Sequence[float]
) -> tuple[Trial, list[float]]:
    """Compute a candidate's loss, as long as its bounds stay within the limit.

    Args:
      runner: Runs the candidate.
      candidate: The path to try.
      limit: Loss above which it is stopped; infinity for never.
      reference: All bounds of another candidate, to estimate the whole from; empty without a limit.

    Returns:
      The trial, and the bounds up to its end.
    """
    bounds: list[float] = []
    for bound in runner.loss_bounds(candidate):
        bounds.append(bound)
        if not math.isfinite(bound):  # bounds only rise, so the loss is not finite either
            return Trial(None, None, math.inf), bounds
        # Strictly above: of equal losses the earliest block goes, and it may be tried later.
        if bound > limit and len(bounds) < runner.bounds_per_loss:
            # Losses of candidates grow alike along the vocabulary, so their ratio is kept.
            estimate = bound * reference[-1] / reference[len(bounds) - 1]
            return Trial(None, limit, estimate), bounds
    return Trial(bounds[-1], None, bounds[-1]), bounds


def try_candidates(
    runner: Runner,
    candidates: Mapping[int, Candidate],
    needed: int,
    stop_early: bool,
    advance: Callable[[], None],
) -> dict[int, Trial]:
    """Try every candidate of a phase.

    Args:
      runner: Runs the candidates.
      candidates: By unit, in the order to try them.
      needed: Number of lowest losses that must be known.
      stop_early: Whether to stop candidates that cannot be among them.
      advance: Called after every candidate.

    Returns:
      Trials by unit.
    """
    trials: dict[int, Trial] = {}
    reference: list[float] = []
    for unit, candidate in candidates.items():
        losses = sorted(t.loss for t in trials.values() if t.loss is not None)
        # The needed-th lowest loss: beyond it a candidate cannot be chosen any more.
        limit = losses[needed - 1] if stop_early and len(losses) >= needed else math.inf
        trials[unit], bounds = try_candidate(runner, candidate, limit, reference)
        if not reference and trials[unit].loss is not None:
            reference = bounds
        advance()
    return trials
