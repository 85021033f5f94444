"""Search for the units that a model misses least."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.runtime import Runtime
from models.arch import Arch
from models.errors import InputError
from pruning.structured.sleb_finalists import Judge, judge
from pruning.structured.sleb_paths import Candidate, Path, Unit, remove_unit, whole_path
from pruning.structured.sleb_runner import Runner
from pruning.structured.sleb_trials import Trial, try_candidates


def writers_of(arch: Arch) -> tuple[str, ...]:
    """Return the linears of a block that write to the residual stream.

    Args:
      arch: Architecture.
    """
    return tuple(s.name for s in arch.slots if s.feeds == "next")


class SearchResult(NamedTuple):
    """Result of a search.

    Attributes:
      path: The pieces that stay.
      removed: Removed units, in order.
      phases: By phase: trials by unit.
      influence: Influence of each unit that it was measured for.
      evaluations: By phase: blocks times windows that were run.
      plain_evaluations: The same for a search that keeps no states and stops no candidate.
      divergences: By generation of an evolution: divergence of the best from the dense model.
      repaired: By phase: loss after the repair of those that were judged by it.
    """

    path: Path
    removed: list[int]
    phases: list[dict[int, Trial]]
    influence: dict[int, float]
    evaluations: list[int]
    plain_evaluations: list[int]
    divergences: Sequence[float] = ()
    repaired: Sequence[Mapping[int, float | None]] = ()


def lowest_units(values: Mapping[int, float | None], n: int, quantity: str) -> list[int]:
    """Return the n units of lowest finite value, the earliest of equal ones first.

    Args:
      values: Value of each unit; None where it is unknown.
      n: Number of units.
      quantity: Name of the value, for the error.

    Raises:
      InputError: Fewer than n values are finite.
    """
    # Pairs, so that the earliest of equal losses goes, as by the official strict `<`.
    finite = sorted((v, u) for u, v in values.items() if v is not None and np.isfinite(v))
    if len(finite) < n:
        raise InputError(
            f"only {len(finite)} of {len(values)} candidates have a finite {quantity}, "
            f"and {n} must be removed",
            "try `dtype`=float32 or other calibration data",
        )
    return [u for _, u in finite[:n]]


def without(path: Path, units: Sequence[Unit], writers: tuple[str, ...]) -> Path:
    """Return the path without several units.

    Args:
      path: Holds the units' blocks.
      units: Units to remove.
      writers: All linears of a block that write to the residual stream.
    """
    for unit in units:
        path = remove_unit(path, unit, writers).path
    return path


def measure_influence(
    runner: Runner, units: Mapping[int, Unit], batches: range, runtime: Runtime
) -> dict[int, float]:
    """Return each unit's influence in the dense model, the mean over windows, as a durable step.

    Args:
      runner: Runs the model with parts left out.
      units: Units by index.
      batches: Micro-batches to measure it on.
      runtime: Progress and journal.
    """
    path = whole_path(runner.depth)
    writers = writers_of(runner.arch)

    def compute() -> dict[int, float]:
        advance = runtime.progress("measuring influence", len(batches), unit="batches")
        by_batch = []
        for m in batches:
            by_batch.append(runner.influences(m, path, units, writers))
            advance()
        windows = [runner.windows[m] for m in batches]
        # Weighted, as the last micro-batch may be smaller.
        return {u: float(np.average([x[u] for x in by_batch], weights=windows)) for u in units}

    key = ("influences", runner.digest, tuple(units.items()), batches)
    # A journal gives the keys back as text.
    return {int(u): x for u, x in runtime.step(compute, key).items()}


def _run_phase(
    runner: Runner,
    candidates: Mapping[int, Candidate],
    needed: int,
    stop_early: bool,
    advance: Callable[[], None],
    runtime: Runtime,
) -> tuple[dict[int, Trial], int]:
    """Return the trials of a phase and the evaluations run for them, as a durable step."""

    def compute() -> Any:
        before = runner.evaluations
        trials = try_candidates(runner, candidates, needed, stop_early, advance)
        # Lists, because a journal turns keys into text and tuples into lists.
        return [[u, *trial] for u, trial in trials.items()], runner.evaluations - before

    # Trials depend on the order too: it decides which candidates are stopped.
    paths = tuple((u, candidate.path) for u, candidate in candidates.items())
    key = ("losses", runner.digest, paths, needed, stop_early)
    trials, evaluations = runtime.step(compute, key)
    return {u: Trial(*trial) for u, *trial in trials}, evaluations


def _search_by_influence(
    runner: Runner, units: Mapping[int, Unit], n: int, runtime: Runtime
) -> SearchResult:
    """Remove the n units of lowest influence in the dense model."""
    influence = measure_influence(runner, units, range(len(runner.windows)), runtime)
    removed = lowest_units(influence, n, "influence")
    whole = whole_path(runner.depth)
    path = without(whole, [units[u] for u in removed], writers_of(runner.arch))
    return SearchResult(path, removed, [], influence, [runner.evaluations], [runner.evaluations])


def _run_of(
    path: Path, units: Mapping[int, Unit], u: int, n: int, writers: tuple[str, ...]
) -> Candidate | None:
    """Return the path without n neighbouring units from u on; None if one may not go."""
    run = [units.get(v) for v in range(u, u + n)]
    first, *others = run
    if first is None or None in others:
        return None
    candidate = remove_unit(path, first, writers)
    rest = [unit for unit in others if unit is not None]
    return candidate._replace(path=without(candidate.path, rest, writers))


def _search_contiguous(
    runner: Runner, units: Mapping[int, Unit], n: int, stop_early: bool, runtime: Runtime
) -> SearchResult:
    """Remove the n neighbouring units whose absence gives the lowest loss."""
    writers = writers_of(runner.arch)
    path = whole_path(runner.depth)
    runs = {u: _run_of(path, units, u, n, writers) for u in units}
    candidates = {u: run for u, run in runs.items() if run is not None}
    advance = runtime.progress("trying removals", len(candidates), unit="trials")
    trials, evaluations = _run_phase(runner, candidates, 1, stop_early, advance, runtime)
    (start,) = lowest_units({u: t.loss for u, t in trials.items()}, 1, "loss")
    removed = list(range(start, start + n))
    plain = sum(len(c.path) for c in candidates.values()) * sum(runner.windows)
    return SearchResult(candidates[start].path, removed, [trials], {}, [evaluations], [plain])


def _search_by_loss(
    runner: Runner,
    units: Mapping[int, Unit],
    n: int,
    rounds: int,
    stop_early: bool,
    runtime: Runtime,
    by: Judge | None,
) -> SearchResult:
    """Remove n units in `rounds` phases of trials, the units of lowest loss in each."""
    writers = writers_of(runner.arch)
    path = whole_path(runner.depth)
    order = list(units)
    influence: dict[int, float] = {}
    if stop_early:
        # A good order finds the best candidate early, so that the others stop early. One
        # micro-batch is enough for an order.
        influence = measure_influence(runner, units, range(1), runtime)
        order = sorted(order, key=lambda u: (influence[u], u))
    steps = sum(len(order) - phase for phase in range(rounds))
    advance = runtime.progress("trying removals", steps, unit="trials")
    repaired: list[Mapping[int, float | None]] = []
    result = SearchResult(path, [], [], influence, [], [])
    for _ in range(rounds):
        # One unit in each of n phases, or all n after the only one.
        candidates = {u: remove_unit(path, units[u], writers) for u in order}
        needed = by.finalists if by else n // rounds
        trials, evaluations = _run_phase(runner, candidates, needed, stop_early, advance, runtime)
        losses: Mapping[int, float | None] = {u: trial.loss for u, trial in trials.items()}
        if by:
            known = sum(loss is not None for loss in losses.values())
            finalists = lowest_units(losses, min(needed, max(known, 1)), "loss")
            losses = judge(by, {u: candidates[u] for u in finalists}, runner.digest, runtime)
            repaired.append(losses)
        removed = lowest_units(losses, n // rounds, "loss")
        for u in removed:
            # No later path holds this piece, so its states only take memory.
            runner.forget(path[candidates[u].shared])
        path = without(path, [units[u] for u in removed], writers)
        result.phases.append(trials)
        result.removed.extend(removed)
        result.evaluations.append(evaluations)
        pieces = sum(len(candidate.path) for candidate in candidates.values())
        result.plain_evaluations.append(pieces * sum(runner.windows))
        if stop_early:
            # The losses of this phase order the next one better than influence does.
            order.sort(key=lambda u: (trials[u].estimate, u))
        order = [u for u in order if u not in removed]
    return result._replace(path=path, repaired=repaired)


def given_units(
    depth: int, units: Mapping[int, Unit], removed: Sequence[int], writers: tuple[str, ...]
) -> SearchResult:
    """Remove the units that the user names, without a search.

    Args:
      depth: Number of blocks.
      units: All units by index.
      removed: Units to remove.
      writers: All linears of a block that write to the residual stream.
    """
    path = without(whole_path(depth), [units[u] for u in removed], writers)
    return SearchResult(path, list(removed), [], {}, [], [])


def search_units(
    runner: Runner,
    units: Mapping[int, Unit],
    n: int,
    rounds: int,
    stop_early: bool,
    runtime: Runtime,
    contiguous: bool = False,
    by: Judge | None = None,
) -> SearchResult:
    """Choose the units to remove.

    Args:
      runner: Runs the model with parts left out.
      units: Candidates by index.
      n: Number of units to remove.
      rounds: Phases of trials, each of which removes the same number; 0 to go by influence alone.
      stop_early: Whether to stop candidates that cannot be the best.
      runtime: Progress and journal.
      contiguous: Whether the units must be neighbours; they are then chosen in one phase.
      by: Judges the best candidates of each phase again; None: the plain loss decides.

    Returns:
      The units removed, and the figures of the search.

    Raises:
      InputError: Too few candidates have a finite loss or influence.
    """
    if not n:
        return SearchResult(whole_path(runner.depth), [], [], {}, [], [])
    if contiguous:
        return _search_contiguous(runner, units, n, stop_early, runtime)
    if not rounds:
        return _search_by_influence(runner, units, n, runtime)
    return _search_by_loss(runner, units, n, rounds, stop_early, runtime, by)
