"""NeuroAL (Cunegatti et al. 2025): sparsities of blocks, then of rows, tried out by pruning with them.

Both steps have one parameter, lambda, and try values of it. All trials of a step walk the blocks together, so weights are read once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from calibration.observers import Observer, fading_second_moment, gram, pair, second_moment
from calibration.passes import BlockResult, micro_batches, observe, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block, Model, cross_entropy
from models.errors import InputError
from models.programs import program
from models.sharding import place, to_host, tree_to_host
from pruning.allocation.figures import allocation_figures, search_figure
from pruning.allocation.neuroal_core import misalignment, row_fractions, schedule
from pruning.budget import (
    LEAST,
    MOST,
    Shapes,
    all_shapes,
    block_means,
    by_block,
    exact,
    fraction_of,
    within,
)
from pruning.types import Allocation, Allocator, Budget, Layerwise, Pruner, Request
from pruning.weights.per_linear import (
    counts_for,
    every_tap,
    prepare_tap,
    readers,
    solve_block,
    with_weights,
)

GRID = (*(i / 100 for i in range(1, 11)), 0.12, 0.15, 0.2, 0.25)  # of the released code
DENSEST = 0.8  # from this sparsity on the released block step leaves the last of GRID out
COARSE, STEP = (
    (0.0, 0.05, 0.1, 0.15, 0.2, 0.25),
    0.025,
)  # tried first; then this much to both sides of the best
ROWS = (0.05, 0.1, 0.2, 0.3)
TRIAL_BYTES = 1 << 30  # weights of one block that trials solved together may take
DENSE_BYTES = (
    1 << 30
)  # what is known of the dense model's blocks that a search may keep from one walk to the next

Norms = list[dict[str, np.ndarray]]  # a block's {tap: norms of its channels [c]}


class _Search(NamedTuple):
    """What trials of budgets have in common; `tokens` are the search windows, `dense` what `_dense` keeps, a block each."""

    model: Model
    tokens: np.ndarray
    request: Request
    runtime: Runtime
    layerwise: Layerwise
    shapes: Shapes
    dense: list[tuple[Mapping[str, Any], dict[str, np.ndarray]]]

    @property
    def pruner(self) -> Pruner:
        return self.layerwise.pruner

    def walk(self, what: str, visit: Any) -> None:
        """Walk the search windows through the blocks, with a progress bar that says what is tried."""
        visit_blocks(self.model, self.tokens, self.runtime, visit, name=what, durable=False)

    def tried(
        self, trials: "Trials", budgets: Sequence[Budget], what: str
    ) -> tuple[list[float], list[Norms]]:
        """What the trials give, a durable step of the run."""
        return self.runtime.step(lambda: trials(self, budgets, what))


Trials = Callable[[_Search, Sequence[Budget], str], tuple[list[float], list[Norms]]]


def _norms(stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        tap: np.sqrt(np.asarray(tree_to_host(state).per_sample, np.float64))
        for tap, state in stats.items()
    }


def _watch(arch: Arch, pruner: Pruner, norm: Observer) -> dict[str, Observer]:
    """What a dense block is watched with: what the pruner must see, if anything, beside the norms."""
    return {s.reads: pair(pruner.observer, norm) if pruner.observer else norm for s in arch.slots}


def _seen(pruner: Pruner, stats: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `_watch` saw: (the pruner's statistics, the norms) by tap."""
    if pruner.observer:
        return {tap: s[0] for tap, s in stats.items()}, _norms(
            {tap: s[1] for tap, s in stats.items()}
        )
    return dict.fromkeys(stats), _norms(stats)


def _aligned(
    search: _Search, budgets: Sequence[Budget], what: str
) -> tuple[list[float], list[Norms]]:
    """The released code's trials: (misalignment of each budget, by how much dense norms exceed pruned ones in each).

    In each trial every block is run dense, pruned by what was seen, and run again, on what the trial's own pruned blocks give.
    """
    arch, pruner = search.model.arch, search.pruner
    norm = fading_second_moment if pruner.observer is gram else second_moment
    pruners, norms = every_tap(arch, pruner), {s.reads: norm for s in arch.slots}
    scores, lost = [0.0] * len(budgets), [[] for _ in budgets]  # type: tuple[list[float], list[Norms]]
    streams: list[States] = []

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        if i == 0:
            streams.extend(xs.copy() for _ in budgets)
        for k, budget in enumerate(budgets):
            if i > 0 or k == 0:  # before the first block all trials are the same
                stats, dense = _seen(
                    pruner, observe(arch, _watch(arch, pruner, norm), i, block, streams[k])
                )
            new, _ = solve_block(
                arch,
                pruners,
                block,
                stats,
                counts_for(arch, search.layerwise.pattern, block, budget[i]),
            )
            sparse = _norms(observe(arch, norms, i, new, streams[k], onward=True))
            scores[k] += sum(misalignment(dense[s.reads], sparse[s.reads]) for s in arch.slots)
            lost[k].append({tap: dense[tap] - sparse[tap] for tap in dense})
        return BlockResult(block, propagated=True)

    search.walk(what, visit)
    return scores, lost


@program("trials solved", static=(0, 1))
def _solved(
    arch: Arch,
    pruner: Pruner,
    block: Block,
    prepared: Mapping[str, Any],
    counts: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The slots' matrices [n out in] for counts [n ...]; what does not depend on the counts, such as the scores, is done once."""

    def one(counts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        new: dict[str, jax.Array] = {}
        for tap, names in readers(arch, counts).items():
            ws = [getattr(block, name).w for name in names]
            solved = pruner.solve(ws, prepared[tap], [counts[name] for name in names])
            new |= {name: w for name, (w, _) in zip(names, solved, strict=True)}
        return new

    return jax.vmap(one)(counts)


def _trials(
    search: _Search, block: Block, prepared: Mapping[str, Any], counts: list[dict[str, np.ndarray]]
) -> Iterator[Block]:
    """The block pruned with each of the counts, as many at a time as fit in TRIAL_BYTES."""
    slots = search.model.arch.slots
    size = sum(getattr(block, s.name).w.nbytes for s in slots)
    most = max(1, TRIAL_BYTES // size)
    for start in range(0, len(counts), most):
        some = counts[start : start + most]
        stacked = {s.name: np.stack([c[s.name] for c in some]) for s in slots}
        ws = _solved(search.model.arch, search.pruner, block, prepared, stacked)
        for k in range(len(some)):
            yield with_weights(block, {name: w[k] for name, w in ws.items()})


def _dense(
    search: _Search, i: int, block: Block, xs: States, last: bool
) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    """What the pruner makes of the dense block's statistics, and the norms, by tap: watched by the first walk, or by each if all blocks'
    would take more than DENSE_BYTES."""
    depth = len(search.model.blocks)
    if len(search.dense) == depth:
        return search.dense[i]
    stats, norms = _seen(
        search.pruner,
        observe(
            search.model.arch,
            _watch(search.model.arch, search.pruner, second_moment),
            i,
            block,
            xs,
            onward=not last,
        ),
    )
    prepared = {tap: prepare_tap(search.pruner, s, tap)[0] for tap, s in stats.items()}
    if depth * sum(x.nbytes for x in jax.tree.leaves(prepared)) <= DENSE_BYTES:
        search.dense.append((prepared, norms))
    return prepared, norms


def _losses(
    search: _Search, budgets: Sequence[Budget], what: str
) -> tuple[list[float], list[Norms]]:
    """Each budget's mean cross-entropy on the search windows, and by how much the dense model's norms exceed the pruned ones'.

    Statistics, and what the pruner makes of them, are those of the dense model, so that all trials share them.
    """
    arch, runtime = search.model.arch, search.runtime
    norms = {s.reads: second_moment for s in arch.slots}
    streams: list[States] = []
    lost: list[Norms] = [[] for _ in budgets]

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        if i == 0:
            streams.extend(xs.copy() for _ in budgets)
        prepared, dense = _dense(search, i, block, xs, last)
        counts = [
            counts_for(arch, search.layerwise.pattern, block, budget[i]) for budget in budgets
        ]
        for k, new in enumerate(_trials(search, block, prepared, counts)):
            sparse = _norms(observe(arch, norms, i, new, streams[k], onward=True))
            lost[k].append({tap: dense[tap] - sparse[tap] for tap in dense})
        return BlockResult(block, propagated=True)

    search.walk(what, visit)
    non_block = place(search.model.non_block, runtime.mesh)
    windows = list(micro_batches(search.tokens, runtime.batch, runtime.mesh))

    def loss(xs: States) -> float:
        return float(
            np.mean(
                np.concatenate(
                    [
                        to_host(cross_entropy(arch, non_block, x, t))
                        for x, t in zip(xs, windows, strict=True)
                    ]
                )
            )
        )

    return [loss(xs) for xs in streams], lost


def _aims(arch: Arch) -> dict[str, tuple[str, bool]]:
    """{slot: (the tap that its rows feed, whether that is in the next block)}; through the residual stream, the tap after its own."""
    taps = list(dict.fromkeys(s.reads for s in arch.slots))
    after = {tap: (taps[(j + 1) % len(taps)], j + 1 == len(taps)) for j, tap in enumerate(taps)}
    return {s.name: after[s.reads] if s.feeds == "next" else (s.feeds, False) for s in arch.slots}


def _official_rows(search: _Search, lost: Norms, means: np.ndarray, lam: float) -> Budget:
    """The released row step: the last block, and what feeds a next block, stay even; grouped heads take the first rows' fractions; a row
    keeps the whole part of what it should."""
    budget = []
    for i, block in enumerate(search.shapes):
        fractions = {}
        for slot, (tap, beyond) in _aims(search.model.arch).items():
            rows, columns = block[slot]
            even = beyond or i == len(search.shapes) - 1
            f = (
                np.full(rows, means[i])
                if even
                else row_fractions(lost[i][tap], means[i], lam)[:rows]
            )
            fractions[slot] = fraction_of(
                columns - np.trunc((1 - np.clip(f, LEAST, MOST)) * columns), columns
            )
        budget.append(fractions)
    return tuple(budget)


def _of_rows(arch: Arch, slot: str, tap: str, lost: np.ndarray, rows: int) -> np.ndarray | None:
    """What the channels [c] that a slot's rows feed lost, by row [rows]: of query heads that share a key-value head, the mean."""
    for group in arch.groups:
        for writer in group.writers:
            if (arch.tap(group.reader.name), writer.name) == (tap, slot):
                lost = (
                    lost.reshape(-1, group.reader.width // writer.width, writer.width)
                    .mean(1)
                    .reshape(-1)
                )
    return lost if len(lost) == rows else None


def _rows(search: _Search, lost: Norms, means: np.ndarray, lam: float) -> Budget:
    """Every row by what the channel that it feeds lost, in the next block too; rows of the last block's last linear stay even."""
    arch, budget = search.model.arch, []
    for i, block in enumerate(search.shapes):
        fractions = {}
        for slot, (tap, beyond) in _aims(arch).items():
            aimed = lost[i + beyond][tap] if i + beyond < len(lost) else np.zeros(block[slot][0])
            own = _of_rows(arch, slot, tap, aimed, block[slot][0])
            fractions[slot] = (
                np.asarray(means[i]) if own is None else row_fractions(own, means[i], lam)
            )
        budget.append(fractions)
    return exact(tuple(budget), search.shapes, search.request.sparsity)


class _Step(NamedTuple):
    """Values of lambda that were tried, ascending, with their scores, and the best one with its budget and what it lost; None: none."""

    lambdas: list[float]
    scores: list[float]
    best: float | None
    budget: Budget
    lost: Norms


def _official_search(search: _Search, step: str) -> tuple[_Step, _Step]:
    """The released search: of least misalignment, the first."""
    model, s = search.model, search.request.sparsity
    grid = [lam for lam in GRID if s < DENSEST or lam < GRID[-1]] if step != "row" else []
    even = [within(schedule(len(model.blocks), s, lam)) for lam in grid] or [
        np.full(len(model.blocks), s)
    ]
    budgets = [by_block(model, f) for f in even]
    scores, lost = search.tried(_aligned, budgets, "trying block-wise sparsities")
    k = int(np.argmin(scores))
    first = _Step(grid, scores if grid else [], grid[k] if grid else None, budgets[k], lost[k])
    if step == "block":
        return first, _Step([], [], None, first.budget, [])
    grid = [0.0, *GRID]
    budgets = [_official_rows(search, lost[k], even[k], lam) for lam in grid]
    scores, lost = search.tried(_aligned, budgets, "trying row-wise sparsities")
    k = int(np.argmin(scores))
    return first, _Step(grid, scores, grid[k], budgets[k], lost[k])


def _corrected_search(search: _Search, step: str) -> tuple[_Step, _Step]:
    """The search by loss: a coarse grid and the neighbourhood of its best for the blocks, a short grid for the rows."""
    model, s = search.model, search.request.sparsity
    found: dict[float, tuple[float, Budget, Norms]] = {}

    def even(lam: float) -> np.ndarray:
        return schedule(len(model.blocks), s, lam)

    def best() -> float:
        return min(found, key=lambda lam: found[lam][0])

    def attempt(lambdas: Sequence[float], budgets: list[Budget], what: str) -> None:
        losses, lost = search.tried(_losses, budgets, what)
        found.update(zip(lambdas, zip(losses, budgets, lost, strict=True), strict=True))

    def finished() -> _Step:
        lambdas = sorted(found)
        _, budget, lost = found[best()]
        return _Step(lambdas, [found[lam][0] for lam in lambdas], best(), budget, lost)

    def blocks(lambdas: Sequence[float]) -> None:
        budgets = [exact(by_block(model, even(lam)), search.shapes, s) for lam in lambdas]
        attempt(lambdas, budgets, "trying block-wise sparsities")

    blocks(COARSE if step != "row" else (0.0,))
    if step != "row":
        blocks([lam for lam in (best() - STEP, best() + STEP) if lam > 0])
    first = finished()
    if step == "block":
        return first, _Step([], [], None, first.budget, [])
    found = {0.0: found[best()]}
    means = np.array(block_means(first.budget, search.shapes))
    attempt(
        ROWS, [_rows(search, first.lost, means, lam) for lam in ROWS], "trying row-wise sparsities"
    )
    return first, finished()


def neuroal(
    step: Literal["block", "row", "both"] = "both",
    samples: int = 8,
    variant: Literal["corrected", "official"] = "corrected",
) -> Allocator:
    """NeuroAL (Cunegatti et al. 2025): sparsity that grows from block to block, then rows by the activity that their channels lost.

    Args:
      step: what is searched: blocks, rows around an even sparsity, or rows on top of the best blocks.
      samples: calibration windows that are tried on, the first of them.
      variant: "official" chooses by the misalignment of neurons as the released code does, on its grids, with its rounding.
        "corrected", the default, chooses by the loss of the model pruned with the trial's budget, which predicts perplexity where
        misalignment does not, on a shorter grid that holds the even sparsity, and meets the sparsity to one unit.
    """
    if samples < 1:
        raise InputError(f"neuroal: samples={samples} must be at least 1")

    def allocate(
        model: Model, tokens: np.ndarray, request: Request, runtime: Runtime, layerwise: Layerwise
    ) -> Allocation:
        official = variant == "official"
        followed = layerwise.pattern.by_row and not (official and layerwise.pruner.observer is gram)
        if step == "row" and not followed:
            raise InputError(
                'neuroal(step="row"): this method has one threshold for all rows of a matrix: use step="block"'
            )
        shapes = all_shapes(model)
        search = _Search(model, tokens[:samples], request, runtime, layerwise, shapes, [])
        first, second = (_official_search if official else _corrected_search)(
            search, step if followed else "block"
        )
        warnings = (
            ()
            if followed or step == "block"
            else ("neuroal: the method cannot follow rows, only blocks were searched",)
        )
        means = block_means(second.budget, shapes)
        best_block = first.best if step != "row" else None
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

    return allocate
