"""LLMRank over a model: dense statistics, importance along the blocks, selection, removal."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model, linear_of
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.surgery import zero_rows
from pruning.structured.llmrank_core import (
    corrected_centrality,
    official_centrality,
)
from pruning.structured.llmrank_importance import (
    NORMS_KEY,
    Ranks,
    importance,
    linears_of,
    measure_norms,
)
from pruning.structured.remove import (
    ADDS_BIAS,
    Keep,
    Repair,
    check_round_to,
    remove,
    removed_outcome,
)
from pruning.structured.select_core import (
    select_lowest_by_count,
    select_lowest_overall,
    select_lowest_per_block,
)
from pruning.structured.unit_scores import block_units
from pruning.types import (
    BlockSink,
    Outcome,
    Removed,
    Request,
    dropped_indices,
    reject_experts,
    reject_weight_settings,
)

ScorerName = Literal["wpr", "mpr", "norm", "activation", "wanda", "random"]
Scope = Literal["local", "global"]
ZEROED = 0.3  # share that mpr zeroes: the authors' scorer has its own, whatever the pruner's is


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
        removed, "refit" fits what stays by least squares, "refit_weights" without a bias, which
        every stock type holds.
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
        return ShapeChange(cut, self.scope == "local", self.repair in ADDS_BIAS)

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return whether the ranks or the repair are those of these windows."""
        return self.scorer not in ("norm", "random") or self.repair != "none"

    @property
    def scores_key(self) -> Hashable:
        """Return what the norms, which ranks are made of, depend on besides model and tokens."""
        return NORMS_KEY

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("llmrank", request)
        if self._official or self.units == "rows":
            reject_experts("llmrank", model)

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
        stats = measure_norms(model, tokens, runtime)
        ranks = importance(model, stats, centrality, backward, request.seed)
        if self.units == "rows":
            return self._zero_rows(model, [r["neurons"] for r in ranks], request, sink)
        # Channels matter to `rows` alone.
        neurons = [{name: r.neurons for name, r in block.items()} for block in ranks]
        request = request.settled(lambda sparsity: self._keep_neurons(neurons, sparsity))
        keeps = self._keep_neurons(neurons, request.sparsity)
        remove(model, tokens, runtime, sink, keeps, self.repair)  # a repair measures pruned inputs
        label = f"importance of MLP neurons ({self.scorer})"
        scores = [
            {linears_of(model.arch.group(name)).up: s for name, s in block.items()}
            for block in neurons
        ]
        return removed_outcome(model.arch, keeps, request, scores, label)

    def _keep_neurons(
        self, neurons: Sequence[Mapping[str, np.ndarray]], fraction: float
    ) -> list[Keep]:
        """Return the neurons that stay, by block and group."""
        # A neuron of every expert, or one of a block without experts, by its number of matrices.
        units = [block_units("neurons", scores, float(len(scores))) for scores in neurons]
        scores = [u.scores for u in units]
        if self.scope == "local":
            keeps = select_lowest_per_block(scores, fraction)
        else:
            keeps = select_lowest_overall(scores, fraction, [u.cost for u in units])
        rounded = (u.round_kept(k, self.round_to) for u, k in zip(units, keeps, strict=True))
        return [u.keep(k) for u, k in zip(units, rounded, strict=True)]

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
        names = linears_of(model.arch.group("neurons"))
        keeps = self._keep_rows(ranks, request.sparsity)
        removed = []
        for i, (block, kept) in enumerate(zip(model.blocks, keeps, strict=True)):
            # The gate and the columns of down stay, as in the official code.
            rows = dict(zip((names.up, names.down), map(dropped_indices, kept), strict=True))
            zeroed = {n: zero_rows(linear_of(block, n), np.array(r, int)) for n, r in rows.items()}
            sink(i, block.replace(**zeroed))
            removed.append({name: Removed(rows=dropped) for name, dropped in rows.items()})
        return Outcome(
            asked=tuple(dict.fromkeys(linears, request.sparsity) for linears in removed),
            removed=tuple(removed),
            scores=tuple({names.up: r.neurons, names.down: r.channels} for r in ranks),
            scores_label=f"importance of rows ({self.scorer})",
        )
