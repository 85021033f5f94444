"""NeuroAL (Cunegatti et al. 2025): search fractions of blocks, then of rows, by pruning.

Both steps have one parameter, lambda, and try values of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from calibration.observers import gram
from calibration.runtime import Runtime
from models.arch import Arch, Model
from models.errors import InputError
from pruning.allocation.figures import allocation_figures, search_figure
from pruning.allocation.neuroal_core import (
    kept_row_fractions,
    mean_over_shared_heads,
    row_fractions,
    schedule,
)
from pruning.allocation.neuroal_trials import (
    Norms,
    Search,
    loss_trials,
    misalignment_trials,
    run_trials,
)
from pruning.budget import all_shapes, block_sparsities, by_block, meet_sparsity
from pruning.budget_core import clip_fractions
from pruning.types import Allocation, Budget, Layerwise, Request

# Values of lambda in the official code.
OFFICIAL_LAMBDAS = (*(i / 100 for i in range(1, 11)), 0.12, 0.15, 0.2, 0.25)
# From this sparsity on the official block step leaves the last of them out.
LAST_LEFT_OUT = 0.8
# The corrected block step tries these, then STEP_AROUND_BEST to both sides of the best.
COARSE_LAMBDAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
STEP_AROUND_BEST = 0.025
# A short grid, as each value costs a forward of the whole model.
ROW_LAMBDAS = (0.05, 0.1, 0.2, 0.3)
BLOCK_PROGRESS, ROW_PROGRESS = "trying block-wise sparsities", "trying row-wise sparsities"


class _FedTap(NamedTuple):
    """Tap that a linear's rows feed.

    Attributes:
      name: Name of the tap.
      in_next_block: Whether it is a tap of the next block.
    """

    name: str
    in_next_block: bool


def _fed_taps(arch: Arch) -> dict[str, _FedTap]:
    """Return the tap that each slot's rows feed.

    Through the residual stream that is the next tap that reads the stream, in this block or in the
    next one.
    """
    # All of the stream reaches the experts; each one's own input has some of the tokens.
    taps = list(dict.fromkeys(s.part_of or s.reads for s in arch.slots))
    fed = {s.feeds for s in arch.slots}
    reads_stream = [tap for tap in taps if tap not in fed]

    def after(tap: str) -> _FedTap:
        later = [t for t in taps[taps.index(tap) + 1 :] if t in reads_stream]
        return _FedTap(later[0], False) if later else _FedTap(reads_stream[0], True)

    return {
        s.name: after(s.reads) if s.feeds == "next" else _FedTap(s.feeds, False) for s in arch.slots
    }


def _official_row_budget(
    search: Search, norm_drops: list[Norms], means: np.ndarray, lam: float
) -> Budget:
    """Return the official row budget.

    The last block stays even, and so do linears that feed the next block. Grouped heads take the
    fractions of the first rows. A row keeps the whole part of what it should.
    """
    budget = []
    for i, block in enumerate(search.shapes):
        fractions = {}
        for slot, fed in _fed_taps(search.model.arch).items():
            if slot not in block:
                continue
            rows, columns = block[slot]
            # Official trials measure the next block's first input on equal inputs, dense and
            # pruned. That drop is exactly zero, so the fractions stay even.
            if fed.in_next_block or i == len(search.shapes) - 1:
                own = np.full(rows, means[i])
            else:
                # Grouped k and v have fewer rows than q. The official kernel reads as many
                # fractions.
                own = row_fractions(norm_drops[i][fed.name], means[i], lam)[:rows]
            # Even rows too: the official row step takes one entry more of each than the block step.
            fractions[slot] = kept_row_fractions(own, columns)
        budget.append(fractions)
    return tuple(budget)


def _drop_by_row(
    arch: Arch, slot: str, tap: str, norm_drop: np.ndarray, rows: int
) -> np.ndarray | None:
    """Return the drop [rows] of the channels [c] that a slot's rows feed; None if they differ."""
    for group in arch.groups:
        for writer in group.writers:
            if (arch.tap(group.reader.name), writer.name) == (tap, slot):
                queries = group.reader.width // writer.width
                norm_drop = mean_over_shared_heads(norm_drop, queries, writer.width)
    return norm_drop if len(norm_drop) == rows else None


def _corrected_row_budget(
    search: Search, norm_drops: list[Norms], means: np.ndarray, lam: float
) -> Budget:
    """Return the budget of every row by the drop of the channel it feeds, in the next block too."""
    arch, budget = search.model.arch, []
    for i, block in enumerate(search.shapes):
        fractions = {}
        # The paper's rule is kept: a row's fraction goes by the norm that its channel lost. The
        # rank of that norm, or the norm relative to the dense one, is no better
        # (docs/decisions/018-neuroal-by-loss.md).
        for slot, fed in _fed_taps(arch).items():
            if slot not in block:
                continue
            rows, _ = block[slot]
            j = i + fed.in_next_block
            # Nothing reads the last block's last linear: its rows stay even.
            drop = norm_drops[j][fed.name] if j < len(norm_drops) else np.zeros(rows)
            own = _drop_by_row(arch, slot, fed.name, drop, rows)
            if own is None:
                fractions[slot] = np.asarray(means[i])
            else:
                fractions[slot] = row_fractions(own, means[i], lam)
        budget.append(fractions)
    return meet_sparsity(tuple(budget), search.shapes, search.request.sparsity)


class _StepResult(NamedTuple):
    """Result of a search step.

    Attributes:
      lambdas: Values that were tried, ascending.
      scores: Their scores; lower is better.
      best: The best value; None if none was tried.
      budget: Its budget.
      norm_drops: Its drops of norms, by block.
    """

    lambdas: list[float]
    scores: list[float]
    best: float | None
    budget: Budget
    norm_drops: list[Norms]


def _official_search(search: Search, step: str) -> tuple[_StepResult, _StepResult]:
    """Return the results of the official block and row steps: the first of least misalignment."""
    depth, sparsity = len(search.model.blocks), search.request.sparsity
    lambdas: list[float] = []
    if step != "row":
        last = OFFICIAL_LAMBDAS[-1]
        lambdas = [lam for lam in OFFICIAL_LAMBDAS if sparsity < LAST_LEFT_OUT or lam < last]
    block_fractions = [clip_fractions(schedule(depth, sparsity, lam)) for lam in lambdas]
    if not block_fractions:
        block_fractions = [np.full(depth, sparsity)]
    budgets = [by_block(search.model, fractions) for fractions in block_fractions]
    trials = run_trials(misalignment_trials, search, budgets, BLOCK_PROGRESS)
    # The first of equal scores, as in the official code.
    k = int(np.argmin(trials.scores))
    norm_drops, means = trials.norm_drops[k], block_fractions[k]
    first = _StepResult([], [], None, budgets[k], norm_drops)
    if lambdas:
        first = _StepResult(lambdas, trials.scores, lambdas[k], budgets[k], norm_drops)
    if step == "block":
        return first, _StepResult([], [], None, first.budget, [])
    # Unlike the block grid, this one has 0, and 0.25 at every sparsity.
    lambdas = [0.0, *OFFICIAL_LAMBDAS]
    budgets = [_official_row_budget(search, norm_drops, means, lam) for lam in lambdas]
    trials = run_trials(misalignment_trials, search, budgets, ROW_PROGRESS)
    k = int(np.argmin(trials.scores))
    return first, _StepResult(lambdas, trials.scores, lambdas[k], budgets[k], trials.norm_drops[k])


class _Tried(NamedTuple):
    """Score, budget and drops of norms of one value of lambda."""

    score: float
    budget: Budget
    norm_drops: list[Norms]


def _try(
    search: Search, lambdas: Sequence[float], budgets: Sequence[Budget], name: str
) -> dict[float, _Tried]:
    """Return the results of trials by loss, by lambda."""
    trials = run_trials(loss_trials, search, budgets, name)
    entries = zip(trials.scores, budgets, trials.norm_drops, strict=True)
    return dict(zip(lambdas, (_Tried(*entry) for entry in entries), strict=True))


def _try_blocks(search: Search, lambdas: Sequence[float]) -> dict[float, _Tried]:
    """Return the results of block schedules with these values, by lambda."""
    depth, sparsity = len(search.model.blocks), search.request.sparsity
    budgets = []
    for lam in lambdas:
        budget = by_block(search.model, schedule(depth, sparsity, lam))
        budgets.append(meet_sparsity(budget, search.shapes, sparsity))
    return _try(search, lambdas, budgets, BLOCK_PROGRESS)


def _best(tried: dict[float, _Tried]) -> float:
    """Return the value of least score."""
    return min(tried, key=lambda lam: tried[lam].score)


def _step_result(tried: dict[float, _Tried]) -> _StepResult:
    """Return the result of a step from all that it tried."""
    lambdas, best = sorted(tried), _best(tried)
    scores = [tried[lam].score for lam in lambdas]
    return _StepResult(lambdas, scores, best, tried[best].budget, tried[best].norm_drops)


def _corrected_search(search: Search, step: str) -> tuple[_StepResult, _StepResult]:
    """Return the results of the block and row steps by loss.

    Blocks are tried on a coarse grid and around its best value, rows on a short grid.
    """
    tried = _try_blocks(search, COARSE_LAMBDAS if step != "row" else (0.0,))
    if step != "row":
        best = _best(tried)
        # Below 0 later blocks would lose less. 0 itself is on the coarse grid.
        tried |= _try_blocks(
            search, [lam for lam in (best - STEP_AROUND_BEST, best + STEP_AROUND_BEST) if lam > 0]
        )
    first = _step_result(tried)
    if step == "block":
        return first, _StepResult([], [], None, first.budget, [])
    # The best blocks with even rows are a trial of the row step as well.
    tried = {0.0: tried[_best(tried)]}
    # After rounding to whole entries, so not exactly those of the schedule.
    means = np.array(block_sparsities(first.budget, search.shapes))
    budgets = [_corrected_row_budget(search, first.norm_drops, means, lam) for lam in ROW_LAMBDAS]
    tried |= _try(search, ROW_LAMBDAS, budgets, ROW_PROGRESS)
    return first, _step_result(tried)


@dataclasses.dataclass(frozen=True)
class NeuroAL:
    """NeuroAL (Cunegatti et al. 2025): later blocks lose more, and rows with less active channels.

    Args:
      step: What is searched: blocks, rows around an even sparsity, or rows on top of the best
        blocks.
      samples: Calibration windows that budgets are tried on, the first of them.
      variant: "official" chooses by the misalignment of neurons as the authors' code does, on its
        grids, with its rounding. "corrected", the default, chooses by the loss of the model pruned
        with the trial's budget, which predicts perplexity where misalignment does not, on a
        shorter grid that holds the even sparsity, and meets the sparsity to one unit.
    """

    step: Literal["block", "row", "both"] = "both"
    samples: int = 8
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"neuroal: samples={self.samples} must be at least 1")

    @property
    def reads_activations(self) -> bool:
        """Return that budgets are tried on the windows."""
        return True

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by a search, as `Allocator` says."""
        official = self.variant == "official"
        # The official code gives SparseGPT one threshold a block of columns, whatever the rows.
        by_row = layerwise.pattern.by_row and not (official and layerwise.pruner.observer is gram)
        if self.step == "row" and not by_row:
            raise InputError(
                'neuroal(step="row"): this method has one threshold for all rows of a matrix',
                'use step="block"',
            )
        shapes = all_shapes(model)
        # The first windows, as the official eight are the first of the calibration draw.
        search = Search(model, tokens[: self.samples], request, runtime, layerwise, shapes, [])
        run_search = _official_search if official else _corrected_search
        first, second = run_search(search, self.step if by_row else "block")
        warnings: tuple[str, ...] = ()
        if not by_row and self.step != "block":
            warnings = ("neuroal: the method cannot follow rows, only blocks were searched",)
        means = block_sparsities(second.budget, shapes)
        best_block = first.best if self.step != "row" else None
        details = {
            "block_lambda": best_block,
            "block_lambdas": first.lambdas,
            "block_scores": first.scores,
            "row_lambda": second.best,
            "row_lambdas": second.lambdas,
            "row_scores": second.scores,
            "block_sparsity": means,
        }
        figures = [*allocation_figures(means, request.sparsity)]
        if first.lambdas:
            figures.append(search_figure("block", first.lambdas, first.scores, best_block))
        if second.lambdas:
            figures.append(search_figure("row", second.lambdas, second.scores, second.best))
        return Allocation(second.budget, details, warnings, tuple(figures))
