"""Trials of NeuroAL: score budgets by pruning with them, all in one pass over the blocks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from calibration.observers import Observer, fading_second_moment, gram, pair, second_moment
from calibration.passes import BlockResult, micro_batches, observe, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Arch, Block, Model, cross_entropy, linear_of
from models.experts import EXPERT_TOKENS
from models.programs import program
from models.sharding import place, to_host, tree_to_host
from pruning.allocation.neuroal_core import misalignment
from pruning.budget import Shapes
from pruning.types import Budget, Layerwise, Pruner, Request
from pruning.weights.expert_tokens import with_token_counts
from pruning.weights.per_linear import (
    counts_for,
    every_tap,
    prepare_tap,
    readers,
    solve_block,
    with_weights,
)

# Bytes of one block's weights that trials solved together may take.
TRIAL_BYTES = 1 << 30
# Bytes of prepared statistics of the dense model that a search may keep from pass to pass.
DENSE_BYTES = 1 << 30

Norms = dict[str, np.ndarray]  # tap -> norms of its channels, or drops of them, [c]


class DenseStatistics(NamedTuple):
    """Statistics of a dense block.

    Attributes:
      prepared: Tap -> what the pruner's `solve` needs.
      norms: Tap -> norms of its channels.
    """

    prepared: Mapping[str, Any]
    norms: Norms


class Search(NamedTuple):
    """Inputs and statistics that all trials of a search share.

    Attributes:
      model: The dense model.
      tokens: Windows that budgets are tried on, int [samples length].
      request: What to remove.
      runtime: How to execute.
      layerwise: What linears are pruned with.
      shapes: Shapes of all slots, by block.
      dense: Statistics of all dense blocks, filled by the first pass if they fit in DENSE_BYTES.
    """

    model: Model
    tokens: np.ndarray
    request: Request
    runtime: Runtime
    layerwise: Layerwise
    shapes: Shapes
    dense: list[DenseStatistics]


class TrialResults(NamedTuple):
    """Results of trials, one entry a budget.

    Attributes:
      scores: Lower is better.
      norm_drops: By block: tap -> dense less pruned norms [c].
    """

    scores: list[float]
    norm_drops: list[list[Norms]]


Trials = Callable[[Search, Sequence[Budget], str], tuple[list[float], list[list[Norms]]]]


def run_trials(
    trials: Trials, search: Search, budgets: Sequence[Budget], name: str
) -> TrialResults:
    """Score budgets in a durable step of the run.

    Args:
      trials: `misalignment_trials` or `loss_trials`.
      search: What the trials share.
      budgets: Budgets to try.
      name: What the progress bar says.
    """
    return TrialResults(*search.runtime.step(lambda: trials(search, budgets, name)))


def _visit(search: Search, name: str, visit: Any) -> None:
    """Visit all blocks with the hidden states of the search windows."""
    # Not durable: the search's step is saved whole, without the hidden states of its trials.
    visit_blocks(search.model, search.tokens, search.runtime, visit, name=name, durable=False)


def _norms(stats: Mapping[str, Any]) -> Norms:
    """Return the norms [c] of second moments, by tap."""
    # The square root in float64 on the host: scores of trials differ in their last digits.
    return {
        tap: np.sqrt(np.asarray(tree_to_host(state).per_sample, np.float64))
        for tap, state in stats.items()
    }


def _dense_watch(arch: Arch, pruner: Pruner, norm: Observer) -> dict[str, Observer]:
    """Return the observers of a dense block: the pruner's, if any, and that of the norms."""
    observer = pair(pruner.observer, norm) if pruner.observer else norm
    return with_token_counts(_watch(arch, observer))


def _watch(arch: Arch, observer: Observer) -> dict[str, Observer]:
    """Return the observer for every tap that linears read, and for all tokens of experts' taps."""
    return {tap: observer for s in arch.slots for tap in (s.reads, s.part_of) if tap}


def _split_dense(pruner: Pruner, stats: Mapping[str, Any]) -> tuple[dict[str, Any], Norms]:
    """Split statistics of `_dense_watch` into the pruner's and the norms."""
    of_taps = {tap: state for tap, state in stats.items() if tap != EXPERT_TOKENS}
    tokens = {tap: state for tap, state in stats.items() if tap == EXPERT_TOKENS}
    if pruner.observer is None:
        return {**dict.fromkeys(of_taps), **tokens}, _norms(of_taps)
    own = {tap: both[0] for tap, both in of_taps.items()}
    return {**own, **tokens}, _norms({tap: both[1] for tap, both in of_taps.items()})


def misalignment_trials(
    search: Search, budgets: Sequence[Budget], name: str
) -> tuple[list[float], list[list[Norms]]]:
    """Score budgets by misalignment, as the official code does.

    In each trial every block runs dense, is pruned by the statistics of that run, and runs again,
    on the outputs of the trial's own pruned blocks.

    Args:
      search: What the trials share.
      budgets: Budgets to try.
      name: What the progress bar says.

    Returns:
      Fields of `TrialResults`.
    """
    arch, pruner = search.model.arch, search.layerwise.pruner
    # The official code takes norms of inputs that SparseGPT has scaled in place.
    norm = fading_second_moment if pruner.observer is gram else second_moment
    pruners, watch_norms = every_tap(arch, pruner), _watch(arch, norm)
    pattern = search.layerwise.pattern
    scores = [0.0] * len(budgets)
    norm_drops: list[list[Norms]] = [[] for _ in budgets]
    streams: list[States] = []

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        if i == 0:
            streams.extend(xs.copy() for _ in budgets)
        for k, budget in enumerate(budgets):
            # Before the first block all trials have the same inputs.
            if i > 0 or k == 0:
                watch = _dense_watch(arch, pruner, norm)
                stats, dense = _split_dense(pruner, observe(arch, watch, i, block, streams[k]))
            counts = counts_for(arch, pattern, block, budget[i])
            new, _ = solve_block(arch, pruners, pattern, block, stats, counts)
            # The run that measures also moves the trial on to its next block.
            sparse = _norms(observe(arch, watch_norms, i, new, streams[k], onward=True))
            reads = [s.reads for s in arch.slots_of(block)]
            scores[k] += sum(misalignment(dense[tap], sparse[tap]) for tap in reads)
            norm_drops[k].append({tap: dense[tap] - sparse[tap] for tap in dense})
        # Trials have states of their own, and nothing reads those of the pass.
        return BlockResult(block, propagated=True)

    _visit(search, name, visit)
    return scores, norm_drops


@program("trials solved", static=(0, 1))
def _solve_trials(
    arch: Arch,
    pruner: Pruner,
    block: Block,
    prepared: Mapping[str, Any],
    counts: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Return the slots' matrices [n out in] for counts [n ...].

    What does not depend on the counts, such as scores, is computed once.
    """

    def solve(counts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        new: dict[str, jax.Array] = {}
        for tap, names in readers(arch, counts).items():
            ws = [linear_of(block, name).w for name in names]
            pruned = pruner.solve(ws, prepared[tap], [counts[name] for name in names])
            new |= {name: w for name, (w, _) in zip(names, pruned, strict=True)}
        return new

    return jax.vmap(solve)(counts)


# One program for all slots, so that the plan counts it and several processes exchange data once.
@program("trial taken")
def _take_trial(ws: Mapping[str, jax.Array], k: jax.Array) -> dict[str, jax.Array]:
    """Return trial k's matrices [out in] from those of all trials [n out in], by slot."""
    return {
        name: jax.lax.dynamic_index_in_dim(w, k, axis=0, keepdims=False) for name, w in ws.items()
    }


def pruned_blocks(
    arch: Arch,
    pruner: Pruner,
    block: Block,
    prepared: Mapping[str, Any],
    counts: Sequence[Mapping[str, np.ndarray]],
) -> Iterator[Block]:
    """Yield the block pruned with each of the counts, solved in groups of TRIAL_BYTES.

    Args:
      arch: Architecture.
      pruner: The layer-wise rule.
      block: The dense block.
      prepared: Tap -> prepared statistics.
      counts: Slot -> entries to remove, for each block to yield.
    """
    slots = [s.name for s in arch.slots_of(block)]
    size = sum(linear_of(block, name).w.nbytes for name in slots)
    # One at a time where a single block exceeds the room, as LLaMA-2-70B's do.
    most = max(1, TRIAL_BYTES // size)
    for start in range(0, len(counts), most):
        group = counts[start : start + most]
        stacked = {name: np.stack([c[name] for c in group]) for name in slots}
        ws = _solve_trials(arch, pruner, block, prepared, stacked)
        for k in range(len(group)):
            yield with_weights(block, _take_trial(ws, np.int32(k)))


def _dense_statistics(
    search: Search, i: int, block: Block, xs: States, last: bool
) -> DenseStatistics:
    """Return block i's dense statistics, kept from the first pass if there is room."""
    depth, pruner = len(search.model.blocks), search.layerwise.pruner
    if len(search.dense) == depth:
        return search.dense[i]
    watch = _dense_watch(search.model.arch, pruner, second_moment)
    seen = observe(search.model.arch, watch, i, block, xs, onward=not last)
    stats, norms = _split_dense(pruner, seen)
    del seen
    reads = {s.reads for s in search.model.arch.slots_of(block)}
    prepared = {tap: prepare_tap(pruner, stats[tap], tap)[0] for tap in stats if tap in reads}
    statistics = DenseStatistics(prepared, norms)
    # All blocks or none: a later pass that lacks one block must run all before it.
    if depth * sum(x.nbytes for x in jax.tree.leaves(prepared)) <= DENSE_BYTES:
        search.dense.append(statistics)
    return statistics


def loss_trials(
    search: Search, budgets: Sequence[Budget], name: str
) -> tuple[list[float], list[list[Norms]]]:
    """Score budgets by the mean cross-entropy of the pruned model on the search windows.

    Pruning statistics are those of the dense model, so that all trials share them.

    Args:
      search: What the trials share.
      budgets: Budgets to try.
      name: What the progress bar says.

    Returns:
      Fields of `TrialResults`.
    """
    arch, runtime = search.model.arch, search.runtime
    watch_norms = _watch(arch, second_moment)
    streams: list[States] = []
    norm_drops: list[list[Norms]] = [[] for _ in budgets]

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        if i == 0:
            # Hidden states once a trial: memory grows with the number of budgets.
            streams.extend(xs.copy() for _ in budgets)
        prepared, dense = _dense_statistics(search, i, block, xs, last)
        pruner, pattern = search.layerwise
        counts = [counts_for(arch, pattern, block, budget[i]) for budget in budgets]
        for k, new in enumerate(pruned_blocks(arch, pruner, block, prepared, counts)):
            sparse = _norms(observe(arch, watch_norms, i, new, streams[k], onward=True))
            norm_drops[k].append({tap: dense[tap] - sparse[tap] for tap in dense})
        # `_dense_statistics` moves the pass's states on, until it has kept what they are for.
        return BlockResult(block, propagated=True)

    _visit(search, name, visit)
    non_block = place(search.model.non_block, runtime.mesh)
    windows = list(micro_batches(search.tokens, runtime.batch, runtime.mesh))
    scores = []
    for xs in streams:
        losses = []
        for x, t in zip(xs, windows, strict=True):
            losses.append(to_host(cross_entropy(arch, non_block, x, t)))
        # Over windows: a smaller last micro-batch must not weigh as much as the others.
        scores.append(float(np.mean(np.concatenate(losses))))
    return scores, norm_drops
