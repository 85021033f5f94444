"""LLMRank over a model: statistics from one dense walk, importance along the blocks, selection, and rows zeroed or neurons cut."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Observer, batch_norms
from calibration.passes import Rehearse, rehearse_fold
from models.arch import Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.sharding import to_host
from models.surgery import zero_rows
from pruning.structured import remove as whole
from pruning.structured import select
from pruning.structured.llmrank_core import (
    Centrality,
    Ffn,
    corrected_centrality,
    flow,
    official_centrality,
)
from pruning.structured.remove import Keep, Repair, check_round_to, outcome, remove
from pruning.types import BlockSink, Method, Outcome, Removed, Request, dropped_indices, whole_units
from pruning.walk import fold

ScorerName = Literal["wpr", "mpr", "norm", "activation", "wanda", "random"]
Scope = Literal["local", "global"]
ZEROED = (
    0.3  # the share that mpr zeroes: the released scorer's own amount, whatever the pruner's is
)
HostRanks = tuple[np.ndarray, np.ndarray]  # of neurons [f] and of channels [d]
RUN_BYTES = (
    2 << 30
)  # weights stacked for one scan; the importance is carried from one scan to the next


def _linears(model: Model) -> tuple[tuple[str, ...], str, str]:
    """The gates, the linear path into the neurons, and their reader: ("gate",), "up", "down" for LLaMA; (), "fc1", "fc2" for OPT."""
    group = model.arch.group("neurons")
    *gates, up = (w.name for w in group.writers)
    return tuple(gates), up, group.reader.name


def _watch(model: Model) -> dict[str, Observer]:
    """The norms of what enters and leaves up and down."""
    _, up, down = _linears(model)
    return dict.fromkeys((*map(model.arch.tap, (up, down)), up, down), batch_norms)


def _statistics(model: Model, tokens: np.ndarray, request: Request) -> list[dict[str, np.ndarray]]:
    """A block's norms of what enters up and down, and of what leaves them; one dense forward."""
    _, up, down = _linears(model)
    into_up, into_down = map(model.arch.tap, (up, down))

    def visit(i: int, block: Block, stats: Any) -> tuple[Block, Any]:
        norms = {name: s.mean for name, s in stats.items()}
        return block, {
            "a_in": norms[into_up],
            "a_up": norms[up],
            "a_mid": norms[into_down],
            "a_down": norms[down],
        }

    return fold(
        model,
        tokens,
        request,
        visit,
        watch=_watch(model),
        propagate="dense",
        what="measuring activations",
        key="norms",
    )


def _noise(seed: int, i: int, width: int, which: int) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 2 * i + which), (width,))


def _stacked(model: Model, stats: Sequence[dict[str, np.ndarray]], run: range, seed: int) -> Ffn:
    """The run's feed-forward parts with every array stacked [blocks ...]."""
    gates, up, down = _linears(model)

    def ffn(i: int) -> Ffn:
        block, s = model.blocks[i], jax.tree.map(jnp.asarray, stats[i])
        weights = (
            getattr(block, up).w,
            tuple(getattr(block, g).w for g in gates),
            getattr(block, down).w,
        )
        noise = (_noise(seed, i, s["a_up"].shape[0], 0), _noise(seed, i, s["a_down"].shape[0], 1))
        return Ffn(*weights, s["a_in"], s["a_up"], s["a_mid"], s["a_down"], *noise)

    return jax.tree.map(lambda *xs: jnp.stack(xs), *(ffn(i) for i in run))


def _runs(stats: Sequence[dict[str, np.ndarray]], linears: int) -> list[range]:
    """Consecutive blocks of equal widths, no more in one run than RUN_BYTES of stacked weights."""
    runs = []
    for (f, d), group in itertools.groupby(
        range(len(stats)), lambda i: (stats[i]["a_up"].shape[0], stats[i]["a_in"].shape[0])
    ):
        members, longest = list(group), max(1, RUN_BYTES // (4 * linears * f * d))
        runs += [
            range(r[0], r[-1] + 1)
            for r in (members[k : k + longest] for k in range(0, len(members), longest))
        ]
    return runs


def _importance(
    model: Model,
    stats: Sequence[dict[str, np.ndarray]],
    centrality: Centrality,
    backward: bool,
    seed: int,
) -> list[HostRanks]:
    """Every block's ranks of neurons [f] and channels [d], the importance carried along all blocks."""
    runs = _runs(stats, len(model.arch.group("neurons").writers) + 1)
    carried = jnp.ones_like(stats[0]["a_in"]) if backward else jnp.asarray(stats[0]["a_in"])
    found: dict[int, HostRanks] = {}
    for run in reversed(runs) if backward else runs:
        carried, (neurons, channels) = flow(
            centrality, backward, _stacked(model, stats, run, seed), carried
        )
        found |= {i: (to_host(neurons[k]), to_host(channels[k])) for k, i in enumerate(run)}
    return [found[i] for i in range(len(stats))]


def _keep_rows(
    ranks: Sequence[HostRanks], fraction: float, scope: Scope, chain: bool, official: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which rows of up and of down stay, a pair a block."""
    flat = [r for pair in ranks for r in pair]
    if scope == "local":
        keeps = select.local(flat, fraction)
    elif not official:
        # A row of up holds d parameters, a row of down f: the length of the other's ranks.
        keeps = select.global_(flat, fraction, [len(o) for up, down in ranks for o in (down, up)])
    elif chain:
        keeps = select.global_by_count(flat, fraction)
    else:  # the released code's lists hold one block each
        keeps = [k for pair in ranks for k in select.global_by_count(pair, fraction)]
    return list(zip(keeps[::2], keeps[1::2], strict=True))


def _keep_neurons(
    ranks: Sequence[np.ndarray], fraction: float, scope: Scope, round_to: int
) -> list[Keep]:
    """Which neurons stay; all of a model's neurons hold the same number of parameters."""
    keeps = (
        select.local(ranks, fraction)
        if scope == "local"
        else select.global_(ranks, fraction, [1.0] * len(ranks))
    )
    return [{"neurons": keep} for keep in select.rounded(ranks, keeps, round_to)]


def _zero_rows(
    model: Model, keeps: Sequence[tuple[np.ndarray, np.ndarray]], sink: BlockSink
) -> list[dict[str, Removed]]:
    """Zero the rows of up and of down that do not stay."""
    _, up, down = _linears(model)
    for i, (block, keep) in enumerate(zip(model.blocks, keeps, strict=True)):
        sink(
            i,
            block.replace(
                **{
                    n: zero_rows(getattr(block, n), np.flatnonzero(~k))
                    for n, k in zip((up, down), keep, strict=True)
                }
            ),
        )
    return [
        {up: Removed(rows=dropped_indices(a)), down: Removed(rows=dropped_indices(b))}
        for a, b in keeps
    ]


def llmrank(
    scorer: ScorerName = "wpr",
    gamma: float | None = None,
    theta: float = 0.5,
    zero_pruned: bool = False,
    chain: bool = True,
    scope: Scope = "local",
    units: Literal["neurons", "rows"] = "neurons",
    repair: Repair = "none",
    round_to: int = 0,
    variant: Literal["corrected", "official"] = "corrected",
) -> Method:
    """LLM-Rank (Hoffmann et al. 2024): feed-forward neurons ranked by their centrality in the network's weighted graph.

    Args:
      scorer: weighted PageRank, modified PageRank, or a baseline (L1 norm of the weights, norm of the activations, Wanda's, random).
      gamma: share of the graph against the activations in "wpr"; None: 0 in the official variant, as its authors have it, else 0.5.
      theta: share of the weighted edges against unweighted ones in "wpr".
      zero_pruned: "mpr" first zeroes the lowest 30 % of the importance that comes in (the released code's z_importance).
      chain: importance flows from block to block; else each block stands alone.
      scope: the same fraction of every block, or the lowest of all blocks (which gives blocks of different widths).
      units: "neurons" removes up and gate rows with their down columns for good; "rows" zeroes output rows of up and down, as the
        authors' code does: a row of down is a channel that the block no longer writes.
      repair: of the readers of removed neurons: "bias" adds the mean output of what goes, "refit" fits what stays by least squares.
      round_to: keep a multiple of so many neurons in each block, as hardware likes it (8 to 128); 0: as many as asked.
      variant: "official" is the released code's graph and counts to the letter; "corrected" has the whole neuron as the node and follows
        importance back from the outputs. On SmolLM2-135M, 30 % of the neurons, corrected wpr gives less than half the perplexity of
        the official one (BUILD_NOTES.md has the table), so it is the default.
    """
    official = variant == "official"
    gamma = (0.0 if official else 0.5) if gamma is None else gamma
    if not (0 <= gamma <= 1 and 0 <= theta <= 1):
        raise InputError(f"llmrank: gamma={gamma} and theta={theta} must lie between 0 and 1")
    make = official_centrality if official else corrected_centrality
    centrality = make(scorer, gamma, theta, ZEROED if zero_pruned else 0.0, chain)
    backward = not official and scorer == "wpr"

    if units == "rows" and (repair != "none" or round_to):
        raise InputError(
            'llmrank: repair and round_to are for whole neurons: leave them out, or units="rows"'
        )
    check_round_to("llmrank", round_to)

    def method(model: Model, tokens: np.ndarray, request: Request, sink: BlockSink) -> Outcome:
        _, up, down = _linears(model)
        ranks = _importance(
            model, _statistics(model, tokens, request), centrality, backward, request.seed
        )
        if units == "rows":
            removed = _zero_rows(
                model, _keep_rows(ranks, request.sparsity, scope, chain, official), sink
            )
            return Outcome(
                asked=tuple(dict.fromkeys(r, request.sparsity) for r in removed),
                removed=tuple(removed),
                scores=tuple({up: n, down: c} for n, c in ranks),
                scores_label=f"importance of rows ({scorer})",
            )
        keeps = _keep_neurons([r for r, _ in ranks], request.sparsity, scope, round_to)
        remove(model, tokens, request, sink, keeps, repair)
        return outcome(
            model.arch,
            keeps,
            request,
            [{up: n} for n, _ in ranks],
            f"importance of MLP neurons ({scorer})",
        )

    narrower = ("neurons",) if units == "neurons" else ()
    leaves = ShapeChange(narrower, scope == "local", repair != "none")

    def rehearse(
        model: Model, tokens: jax.ShapeDtypeStruct, request: Request, run: Rehearse
    ) -> None:
        rehearse_fold(
            model, tokens, run, watch=_watch(model), propagate="dense", batch=request.batch
        )
        if repair != "none":
            whole.rehearse(
                model, tokens, request, run, whole.OBSERVED[repair], "pruned", repair, ("neurons",)
            )

    return Method(
        method, leaves, check=functools.partial(whole_units, "llmrank"), rehearse=rehearse
    )
