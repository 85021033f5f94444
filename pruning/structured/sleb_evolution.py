"""Search for the units to remove by evolution, as EvoPress (Sieberling et al. 2025) does."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.runtime import Runtime
from calibration.states import States
from models.errors import InputError
from pruning.allocation.evopress_core import draw_switches
from pruning.structured.sleb_paths import Candidate, Unit, whole_path
from pruning.structured.sleb_runner import Runner
from pruning.structured.sleb_search import (
    SearchResult,
    lowest_units,
    measure_influence,
    without,
    writers_of,
)

OFFSPRING = 16  # of a generation
SURVIVORS = 3  # that are tried on all windows
# The authors take as many generations as removed times kept units, divided by this.
PAIRS_PER_GENERATION = 1.5


def swap(removed: Sequence[int], units: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Return as many removed units, of which one to three are others.

    Args:
      removed: Removed units.
      units: All candidates.
      rng: Source of what is random.
    """
    kept = [u for u in units if u not in removed]
    count = min(draw_switches(rng), len(removed), len(kept))
    back = rng.choice(removed, size=count, replace=False)
    away = rng.choice(kept, size=count, replace=False)
    return sorted({*removed, *away.tolist()} - {*back.tolist()})


class _Evolution:
    """Fitness of sets of removed units: the divergence from the dense model's predictions."""

    def __init__(self, runner: Runner, units: Mapping[int, Unit]) -> None:
        self._runner, self._units = runner, units
        self._writers = writers_of(runner.arch)

    @functools.cached_property
    def _dense(self) -> States:
        """Return the dense model's last hidden states, run when the first set is tried."""
        return self._runner.whole()

    def divergence(self, removed: Sequence[int], batches: Sequence[int]) -> float:
        """Return the mean divergence over the windows of some micro-batches."""
        path = without(
            whole_path(self._runner.depth), [self._units[u] for u in removed], self._writers
        )
        candidate = Candidate(path, min(self._units[u].block for u in removed))
        values = [self._runner.divergences(m, candidate, self._dense[m]) for m in batches]
        mean = float(np.mean(np.concatenate(values).astype(np.float64)))
        return mean if np.isfinite(mean) else np.inf  # NaN would be the least

    def generation(
        self, number: int, seed: int, parent: Sequence[int], kl: float | None
    ) -> dict[str, Any]:
        """Return the best set of a generation and its divergence on all windows.

        Args:
          number: Number of the generation.
          seed: Seed of the search.
          parent: Best set so far.
          kl: Its divergence; None if it is not known.
        """
        # A source of its own, so that a run that goes on needs no state of the one before.
        rng = np.random.default_rng([seed, number])
        every = range(len(self._runner.windows))
        if kl is None:
            kl = self.divergence(parent, every)
        sets = [swap(parent, [*self._units], rng) for _ in range(OFFSPRING)]
        sets = [list(s) for s in dict.fromkeys(map(tuple, sets))]
        if len(every) > 1:
            first = [int(rng.integers(len(every)))]
            scores = [self.divergence(s, first) for s in sets]
            sets = [sets[k] for k in np.argsort(scores, kind="stable")[:SURVIVORS]]
        scores = [kl, *(self.divergence(s, every) for s in sets)]
        best = int(np.argmin(scores))
        return {"removed": [list(parent), *sets][best], "kl": scores[best]}


def search_by_evolution(
    runner: Runner, units: Mapping[int, Unit], n: int, seed: int, runtime: Runtime
) -> SearchResult:
    """Remove the n units whose absence changes the model's predictions least.

    The first set is that of lowest influence. A generation swaps one to three units of the best set
    so far, tries all on one micro-batch, and a few on all windows.

    Args:
      runner: Runs the model with parts left out.
      units: Candidates by index.
      n: Number of units to remove, at least 1.
      seed: Seed of the search.
      runtime: Progress and journal; each generation is a durable step.

    Returns:
      The units removed, and the figures of the search.

    Raises:
      InputError: No set has a finite divergence.
    """
    influence = measure_influence(runner, units, range(len(runner.windows)), runtime)
    removed = sorted(lowest_units(influence, n, "influence"))
    evolution = _Evolution(runner, units)
    generations = max(1, round(n * (len(units) - n) / PAIRS_PER_GENERATION))
    advance = runtime.progress("evolving removals", generations, unit="generations")
    kls: list[float] = []
    for number in range(generations if n < len(units) else 0):
        kl = kls[-1] if kls else None
        evolve = functools.partial(evolution.generation, number, seed, removed, kl)
        found = runtime.step(evolve)
        removed = [int(u) for u in found["removed"]]
        kls.append(float(found["kl"]))
        advance()
    if kls and kls[-1] == np.inf:
        raise InputError(
            "no removal has a finite divergence", "try `dtype`=float32 or other calibration data"
        )
    gone = [units[u] for u in removed]
    path = without(whole_path(runner.depth), gone, writers_of(runner.arch))
    ran = [runner.evaluations]
    return SearchResult(path, removed, [], influence, ran, ran, kls)
