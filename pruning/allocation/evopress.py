"""EvoPress (Sieberling et al. 2025): search sparsities at an exact budget by evolution."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model
from models.errors import InputError
from pruning.allocation.evopress_core import Kind, Unit, make_units, mutate
from pruning.allocation.evopress_trials import Counts, Trials, fractions_at
from pruning.allocation.figures import allocation_figures
from pruning.allocation.mix_trials import MixTrials
from pruning.allocation.width_core import moves, width_units
from pruning.allocation.width_trials import WidthTrials
from pruning.budget import Shapes, all_shapes, block_sparsities, by_block, meet_sparsity
from pruning.figures import LineSeries
from pruning.structured.widths import Selection, Widths
from pruning.types import Allocation, Budget, Layerwise, Request


@dataclasses.dataclass(frozen=True)
class EvoPress:
    """EvoPress (Sieberling et al. 2025): evolve sparsities toward the dense model's predictions.

    Every linear is pruned once at each level. A generation makes offspring of the best mix so far,
    each with one to three switches that raise one unit by a level and lower another, and selects in
    stages: fewer and fewer offspring, on more and more windows. In the last stage the parent
    competes too. Fitness is the KL divergence of the next token's distribution from the dense
    model's. With a method of heads and neurons the levels are widths of blocks, around those that
    the method chose.

    Args:
      generations: Generations of the search.
      offspring: Mixes tried in a generation.
      survivors: Mixes that each stage but the last leaves.
      windows: Windows of each stage, drawn from the searched ones; one more than survivors.
      samples: Calibration windows that are searched on, the first of them.
      unit: Linears, or whole blocks, that have a sparsity of their own; not for widths.
      step: Share of a mean linear, or of a mean block's units, between two levels, about.
      levels: Most levels above or below the even sparsity.
    """

    generations: int = 50
    offspring: int = 16
    survivors: Sequence[int] = (4,)
    windows: Sequence[int] = (1, 4)
    samples: int = 16
    unit: Kind = "linear"
    step: float = 0.025
    levels: int = 4

    def __post_init__(self) -> None:
        # Hashable, as a frozen value is.
        object.__setattr__(self, "survivors", tuple(self.survivors))
        object.__setattr__(self, "windows", tuple(self.windows))
        if min(self.generations, self.offspring, self.samples, self.levels) < 1:
            raise InputError(
                "evopress: generations, offspring, samples and levels must be at least 1"
            )
        if not 0 < self.step < 1:
            raise InputError(f"evopress: step={self.step} must be between 0 and 1")
        if len(self.windows) != len(self.survivors) + 1:
            raise InputError(
                "evopress: windows must have one entry more than survivors, for the last stage"
            )
        if min((*self.windows, *self.survivors)) < 1:
            raise InputError("evopress: windows and survivors must be at least 1")

    @property
    def reads_activations(self) -> bool:
        """Return that mixes are tried on the windows."""
        return True

    def _draw(self, rng: np.random.Generator, count: int, searched: int) -> list[int]:
        """Return the windows of a stage, ascending."""
        chosen = rng.choice(searched, size=min(count, searched), replace=False)
        return sorted(int(i) for i in chosen)

    def _generation(
        self,
        number: int,
        seed: int,
        parent: Sequence[int],
        units: Sequence[Unit],
        trials: MixTrials,
    ) -> dict[str, Any]:
        """Return the best of a generation, with its divergence and that of its parent."""
        # A source of its own, so that a run that goes on needs no state of the one before.
        rng = np.random.default_rng([seed, number])
        mixes = [mutate(parent, units, rng) for _ in range(self.offspring)]
        for count, survivors in zip(self.windows[:-1], self.survivors, strict=True):
            scores = trials.divergences(mixes, self._draw(rng, count, trials.windows))
            mixes = [mixes[k] for k in np.argsort(scores, kind="stable")[:survivors]]
        mixes = [list(parent), *mixes]  # the first of equal ones stays
        scores = trials.divergences(mixes, self._draw(rng, self.windows[-1], trials.windows))
        best = int(np.argmin(scores))
        return {"levels": mixes[best], "kl": scores[best], "kl_of_parent": scores[0]}

    def _search(
        self,
        units: Sequence[Unit],
        trials: MixTrials,
        request: Request,
        runtime: Runtime,
        start: str,
    ) -> "_Found":
        """Return the best mix of levels, with the figures of the search.

        Args:
          units: Units with a level each.
          trials: Trials of their mixes.
          request: Its seed is that of the search.
          runtime: How to execute.
          start: Name of level 0, for the report's reader.
        """
        levels: list[int] = [0] * len(units)
        record = []
        advance = runtime.progress("searching sparsities", self.generations, unit="generations")
        for number in range(self.generations):
            evolve = functools.partial(
                self._generation, number, request.seed, levels, units, trials
            )
            found = runtime.step(evolve)
            levels = [int(level) for level in found["levels"]]
            record.append(found)
            advance()
        # On all searched windows: what is chosen on few may be worse than even on most.
        ends = [[0] * len(units), levels]
        kls = runtime.step(lambda: trials.divergences(ends, range(trials.windows)))
        if min(kls) == np.inf:
            raise InputError(
                "evopress: the pruned model's predictions are not finite",
                "try `dtype`=float32 or other calibration data",
            )
        warnings: tuple[str, ...] = ()
        if kls[1] >= kls[0]:
            levels = ends[0]
            warnings = (f"evopress: nothing better than {start} was found",)
        details = {
            "kl_even": _finite(kls[0]),
            "kl_found": _finite(min(kls)),
            "kl_of_generations": [_finite(found["kl"]) for found in record],
            "kl_of_parents": [_finite(found["kl_of_parent"]) for found in record],
        }
        return _Found(levels, details, warnings)

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by a search, as `Allocator` says."""
        shapes = all_shapes(model)
        alike = by_block(model, np.full(len(shapes), request.sparsity))
        counts = _counts(meet_sparsity(alike, shapes, request.sparsity), shapes)
        units = make_units(shapes, counts, self.unit, self.step, self.levels)
        trials = Trials(model, tokens, self.samples, runtime, layerwise, units, shapes, counts)
        even = "an even sparsity"
        levels, details, warnings = self._search(units, trials, request, runtime, even)
        budget = _budget(units, levels, counts, shapes)
        means = block_sparsities(budget, shapes)
        details |= {"block_sparsity": means}
        figures = (*allocation_figures(means, request.sparsity), _search_figure(details))
        return Allocation(budget, details, warnings, figures)

    def widths(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        selection: Selection,
    ) -> Widths:
        """Move units between blocks by a search, as `WidthAllocator` says."""
        units = width_units(selection.sizes, self.step, self.levels, selection.multiple)
        trials = WidthTrials(model, tokens, self.samples, runtime, selection, units)
        own = "the method's own widths"
        levels, details, warnings = self._search(units, trials, request, runtime, own)
        found = selection.moved(moves(units, levels, len(model.blocks)))
        details |= {"block_sparsity": found.removed_shares()}
        figures = (
            *allocation_figures(details["block_sparsity"], request.sparsity),
            _search_figure(details),
        )
        return Widths(found, details, warnings, figures)


class _Found(NamedTuple):
    """Result of a search: the level of each unit, figures, and sentences for the reader."""

    levels: list[int]
    details: dict[str, Any]
    warnings: tuple[str, ...]


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold, None for one that is not finite."""
    return float(value) if np.isfinite(value) else None


def _counts(budget: Budget, shapes: Shapes) -> Counts:
    """Return the entries of each row that a budget removes."""
    return [
        {slot: int(float(fraction) * block[slot][1]) for slot, fraction in fractions.items()}
        for fractions, block in zip(budget, shapes, strict=True)
    ]


def _budget(units: Sequence[Unit], levels: Sequence[int], counts: Counts, shapes: Shapes) -> Budget:
    """Return the budget of the units' levels."""
    budget: list[dict[str, np.ndarray]] = [{} for _ in shapes]
    for unit, level in zip(units, levels, strict=True):
        i = unit.block
        inputs = {slot: shapes[i][slot][1] for slot in unit.steps}
        budget[i] |= fractions_at(unit, level, counts[i], inputs)
    return tuple(budget)


def _search_figure(details: dict[str, Any]) -> LineSeries:
    """Return a plot of the divergence by generation."""
    return LineSeries(
        title="Divergence from the dense model by generation",
        x_label="generation",
        y_label="KL, nats per token",
        series={"best": details["kl_of_generations"], "parent": details["kl_of_parents"]},
        caption="Each generation draws windows of its own, so compare the two lines, not the ends.",
    )
