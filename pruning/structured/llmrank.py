"""LLMRank over a model: dense statistics, importance along the blocks, selection, removal."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Observer, batch_norms
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import Program, program
from models.sharding import to_host, tree_to_host
from models.surgery import zero_rows
from pruning.structured.llmrank_core import (
    Centrality,
    Ffn,
    corrected_centrality,
    flow,
    official_centrality,
)
from pruning.structured.remove import Keep, Repair, check_round_to, remove, removed_outcome
from pruning.structured.select_core import (
    round_kept,
    select_lowest_by_count,
    select_lowest_overall,
    select_lowest_per_block,
)
from pruning.types import (
    BlockSink,
    Outcome,
    Removed,
    Request,
    dropped_indices,
    reject_weight_settings,
)

ScorerName = Literal["wpr", "mpr", "norm", "activation", "wanda", "random"]
Scope = Literal["local", "global"]
ZEROED = 0.3  # share that mpr zeroes: the authors' scorer has its own, whatever the pruner's is
STACK_BYTES = 2 << 30  # most weights stacked for one scan; importance is carried between scans

_flow = Program(flow, "importance", static=(0, 1))


class Ranks(NamedTuple):
    """Importance of one block, on the host.

    Attributes:
      neurons: Of its neurons [f].
      channels: Of the residual channels it writes [d].
    """

    neurons: np.ndarray
    channels: np.ndarray


class _Linears(NamedTuple):
    """Slots of the feed-forward part.

    Attributes:
      gates: Linears that gate the neurons: ("gate",) for LLaMA, () for OPT.
      up: Linear path into the neurons.
      down: Reader of the neurons.
    """

    gates: tuple[str, ...]
    up: str
    down: str


def _linears(model: Model) -> _Linears:
    group = model.arch.group("neurons")
    *gates, up = (writer.name for writer in group.writers)
    return _Linears(tuple(gates), up, group.reader.name)


def _statistics(model: Model, tokens: np.ndarray, runtime: Runtime) -> list[dict[str, np.ndarray]]:
    """Return every block's activation norms at the inputs and outputs of up and down."""
    names = _linears(model)
    into_up, into_down = model.arch.tap(names.up), model.arch.tap(names.down)
    # Outputs too: PageRank teleports to their norms.
    # Norms over a micro-batch, then their mean: the official ranks depend on the batch.
    watch: dict[str, Observer] = dict.fromkeys(
        (into_up, into_down, names.up, names.down), batch_norms
    )

    def visit(i: int, block: Block, stats: Any) -> tuple[Block, Any]:
        norms = {name: tree_to_host(s).mean for name, s in stats.items()}
        return block, {
            "a_in": norms[into_up],
            "a_up": norms[names.up],
            "a_mid": norms[into_down],
            "a_down": norms[names.down],
        }

    return calibrate_blocks(
        model,
        tokens,
        runtime,
        visit,
        watch=watch,
        propagate="dense",  # as official: nothing is measured anew after pruning
        name="measuring activations",
        key="norms",  # not the scorer: a sweep over scorers measures once
    )


def _noise(seed: int, i: int, width: int, which: int) -> jax.Array:
    """Return uniform noise [width] for block i, for the scorer "random"."""
    # A key for each block and linear: noise must not depend on how blocks are stacked.
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 2 * i + which), (width,))


@program("feed-forward parts stacked")
def _stack(parts: Sequence[Ffn]) -> Ffn:
    """Return the parts of several blocks as one, every array stacked [blocks ...]."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def _stacked(model: Model, stats: Sequence[dict[str, np.ndarray]], blocks: range, seed: int) -> Ffn:
    """Return the feed-forward parts of these blocks, every array stacked [blocks ...]."""
    names = _linears(model)
    parts = []
    for i in blocks:
        block, s = model.blocks[i], {n: jnp.asarray(x) for n, x in stats[i].items()}
        parts.append(
            Ffn(
                getattr(block, names.up).w,
                tuple(getattr(block, gate).w for gate in names.gates),
                getattr(block, names.down).w,
                s["a_in"],
                s["a_up"],
                s["a_mid"],
                s["a_down"],
                _noise(seed, i, s["a_up"].shape[0], 0),
                _noise(seed, i, s["a_down"].shape[0], 1),
            )
        )
    return _stack(parts)


def _stacks(stats: Sequence[dict[str, np.ndarray]], linears: int) -> list[range]:
    """Return runs of consecutive blocks of equal widths whose weights fit in STACK_BYTES."""

    def widths(i: int) -> tuple[int, int]:
        return stats[i]["a_up"].shape[0], stats[i]["a_in"].shape[0]

    stacks = []
    for (f, d), equal in itertools.groupby(range(len(stats)), widths):
        blocks = list(equal)
        # 4 bytes: the scan takes |W| in float32, whatever the type of the weights.
        most = max(1, STACK_BYTES // (4 * linears * f * d))
        for start in range(0, len(blocks), most):
            part = blocks[start : start + most]
            stacks.append(range(part[0], part[-1] + 1))
    return stacks


def _importance(
    model: Model,
    stats: Sequence[dict[str, np.ndarray]],
    centrality: Centrality,
    backward: bool,
    seed: int,
) -> list[Ranks]:
    """Return every block's ranks, with the importance carried along all blocks."""
    stacks = _stacks(stats, len(model.arch.group("neurons").writers) + 1)
    first = stats[0]["a_in"]
    # At the output every channel matters alike; at the input by its norm.
    carried = np.ones_like(first) if backward else first
    ranks: dict[int, Ranks] = {}
    for blocks in reversed(stacks) if backward else stacks:
        carried, (neurons, channels) = _flow(
            centrality, backward, _stacked(model, stats, blocks, seed), carried
        )
        # To the host before the next stack, so that one stack at a time takes device memory.
        neurons, channels = to_host(neurons), to_host(channels)
        for k, i in enumerate(blocks):
            ranks[i] = Ranks(neurons[k], channels[k])
    return [ranks[i] for i in range(len(stats))]


@dataclasses.dataclass(frozen=True)
class LLMRank:
    """LLM-Rank (Hoffmann et al. 2024): rank feed-forward neurons by their centrality.

    Args:
      scorer: "wpr" weighted PageRank, "mpr" modified PageRank, or a baseline: "norm" the L1 norm of
        the weights, "activation" the norm of the activations, "wanda" Wanda's score, "random".
      gamma: Share of the graph against the activations in "wpr". None: 0 in the official variant,
        as its authors have it, else 0.5.
      theta: Share of the weighted edges against unweighted ones in "wpr".
      zero_pruned: First zero the lowest 30 % of the importance that comes in, for "mpr" (the
        authors' z_importance).
      chain: Let importance flow from block to block; else each block stands alone.
      scope: "local" removes the same fraction of every block, "global" the lowest of all blocks,
        which gives blocks of different widths.
      units: "neurons" removes up and gate rows with their down columns for good; "rows" zeroes
        output rows of up and down, as the authors' code does: a row of down is a channel that the
        block no longer writes.
      repair: Repair of the readers of removed neurons: "bias" adds the mean output of what is
        removed, "refit" fits what stays by least squares.
      round_to: Keep a multiple of this many neurons in each block, as hardware likes it (8 to 128);
        0: as many as asked.
      variant: "official" is the authors' graph and counts to the letter. "corrected", the default,
        has the whole neuron as the node and follows importance back from the outputs. On
        SmolLM2-135M, 30 % of the neurons, corrected wpr gives less than half the perplexity of the
        official one (docs/methods/llmrank.md).
    """

    scorer: ScorerName = "wpr"
    gamma: float | None = None
    theta: float = 0.5
    zero_pruned: bool = False
    chain: bool = True
    scope: Scope = "local"
    units: Literal["neurons", "rows"] = "neurons"
    repair: Repair = "none"
    round_to: int = 0
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        for field, value in (("gamma", self._gamma), ("theta", self.theta)):
            if not 0 <= value <= 1:
                raise InputError(
                    "of llmrank must lie between 0 and 1",
                    "give a share such as 0.5",
                    field=field,
                    value=value,
                )
        if self.units == "rows" and (self.repair != "none" or self.round_to):
            raise InputError(
                "`repair` and `round_to` of llmrank are for whole neurons",
                'leave them out, or give `units`="neurons"',
            )
        check_round_to("llmrank", self.round_to)

    @property
    def _official(self) -> bool:
        return self.variant == "official"

    @property
    def _gamma(self) -> float:
        if self.gamma is None:
            return 0.0 if self._official else 0.5  # at 0 the graph vanishes
        return self.gamma

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that neurons are cut, or nothing where rows are zeroed."""
        cut = ("neurons",) if self.units == "neurons" else ()
        return ShapeChange(cut, self.scope == "local", self.repair != "none")

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return whether the ranks or the repair are those of these windows."""
        return self.scorer not in ("norm", "random") or self.repair != "none"

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("llmrank", request)

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        make = official_centrality if self._official else corrected_centrality
        zeroed = ZEROED if self.zero_pruned else 0.0
        centrality = make(self.scorer, self._gamma, self.theta, zeroed, self.chain)
        # Only corrected PageRank follows importance from the outputs back.
        backward = not self._official and self.scorer == "wpr"
        stats = _statistics(model, tokens, runtime)
        ranks = _importance(model, stats, centrality, backward, request.seed)
        if self.units == "rows":
            return self._zero_rows(model, ranks, request, sink)
        neurons = [r.neurons for r in ranks]  # channels matter to `rows` alone
        keeps = self._keep_neurons(neurons, request.sparsity)
        remove(model, tokens, runtime, sink, keeps, self.repair)  # a repair measures pruned inputs
        up = _linears(model).up
        label = f"importance of MLP neurons ({self.scorer})"
        return removed_outcome(model.arch, keeps, request, [{up: n} for n in neurons], label)

    def _keep_neurons(self, neurons: Sequence[np.ndarray], fraction: float) -> list[Keep]:
        """Return the neurons that stay; all of a model's hold the same number of parameters."""
        if self.scope == "local":
            keeps = select_lowest_per_block(neurons, fraction)
        else:
            keeps = select_lowest_overall(neurons, fraction, [1.0] * len(neurons))
        return [{"neurons": keep} for keep in round_kept(neurons, keeps, self.round_to)]

    def _keep_rows(
        self, ranks: Sequence[Ranks], fraction: float
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the rows of up and of down that stay, by block."""
        # up_0, down_0, up_1, ...: the order of the official list.
        flat = [scores for block in ranks for scores in block]
        if self.scope == "local":
            keeps = select_lowest_per_block(flat, fraction)
        elif not self._official:
            # A row of up holds d parameters, a row of down f: the length of the other's ranks.
            costs = [len(other) for block in ranks for other in (block.channels, block.neurons)]
            keeps = select_lowest_overall(flat, fraction, costs)
        elif self.chain:
            # Each linear's ranks sum to one, so longer ones have lower ranks: tiny-llama loses rows
            # of up alone.
            keeps = select_lowest_by_count(flat, fraction)
        else:  # without a chain the authors' lists hold one block each
            keeps = [k for block in ranks for k in select_lowest_by_count(block, fraction)]
        return list(zip(keeps[::2], keeps[1::2], strict=True))

    def _zero_rows(
        self, model: Model, ranks: Sequence[Ranks], request: Request, sink: BlockSink
    ) -> Outcome:
        """Zero the rows of up and down with the lowest ranks."""
        names = _linears(model)
        keeps = self._keep_rows(ranks, request.sparsity)
        removed = []
        for i, (block, kept) in enumerate(zip(model.blocks, keeps, strict=True)):
            # The gate and the columns of down stay, as in the official code.
            rows = dict(zip((names.up, names.down), map(dropped_indices, kept), strict=True))
            zeroed = {n: zero_rows(getattr(block, n), np.array(r, int)) for n, r in rows.items()}
            sink(i, block.replace(**zeroed))
            removed.append({name: Removed(rows=dropped) for name, dropped in rows.items()})
        return Outcome(
            asked=tuple(dict.fromkeys(linears, request.sparsity) for linears in removed),
            removed=tuple(removed),
            scores=tuple({names.up: r.neurons, names.down: r.channels} for r in ranks),
            scores_label=f"importance of rows ({self.scorer})",
        )
