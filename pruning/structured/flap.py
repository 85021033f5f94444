"""FLAP, Wanda-sp and magnitude-sp: remove heads and neurons by scores of the channels they write."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Observer, moments
from calibration.runtime import Runtime
from models.arch import Block, Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import Program, program
from models.sharding import to_host, tree_to_host
from pruning.structured.flap_core import (
    Kept,
    Metric,
    Structure,
    Units,
    input_feature_metrics,
    official_fluctuation,
    select_corrected,
    select_official,
)
from pruning.structured.remove import (
    GROUPS,
    REPAIR_OBSERVERS,
    Keep,
    Repair,
    calibrate_readers,
    check_round_to,
    cost,
    remove,
    remove_units,
    removed_outcome,
    repair_readers,
)
from pruning.structured.select import lowest, rounded
from pruning.types import BlockSink, Outcome, Request, reject_weight_settings

Scope = Literal["local", "global"]
# (W [out in] of a reader, statistics of its input) -> score of each channel [in]
ChannelScore = Callable[[jax.Array, Any], jax.Array]

_metrics = Program(input_feature_metrics, "channels scored")


def _score_readers(
    model: Model, block: Block, stats: Mapping[str, Any], score: ChannelScore
) -> dict[str, np.ndarray]:
    """Return the score of every channel [in], by reader of a group."""
    readers = [model.arch.group(name).reader.name for name in GROUPS]
    return {
        reader: to_host(score(getattr(block, reader).w, stats.get(model.arch.tap(reader))))
        for reader in readers
    }


@dataclasses.dataclass(frozen=True)
class _DenseScores:
    """Scores from one pass over the dense model.

    Attributes:
      heads, neurons: Units with the scores of their channels.
      by_reader: By block: reader -> scores of its channels.
      means: By block: tap -> mean of its channels, where there were statistics.
    """

    heads: Units
    neurons: Units
    by_reader: list[dict[str, np.ndarray]]
    means: list[dict[str, np.ndarray]]


def _score_dense(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    observer: Observer | None,
    score: ChannelScore,
    name: str,
    key: Hashable,
) -> _DenseScores:
    """Score every unit in one pass over the dense model."""
    groups = [model.arch.group(group) for group in GROUPS]

    def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
        means = {}
        if observer:
            means = {tap: tree_to_host(s).mean for tap, s in stats.items()}
        costs = [cost(block, g) for g in groups]  # of a unit: the same in every block
        return block, (_score_readers(model, block, stats, score), means, costs)

    records = calibrate_readers(model, tokens, runtime, visit, observer, "dense", name, key=key)
    by_reader = [scores for scores, _, _ in records]
    means = [mean for _, mean, _ in records]
    costs = records[0][2]
    heads, neurons = (
        Units([scores[g.reader.name] for scores in by_reader], g.reader.width, unit_cost)
        for g, unit_cost in zip(groups, costs, strict=True)
    )
    return _DenseScores(heads, neurons, by_reader, means)


def _round_neurons(kept: Kept, neurons: Sequence[np.ndarray], round_to: int) -> list[Keep]:
    """Return the choice by block and group, with the numbers of neurons rounded."""
    rounded_neurons = rounded(neurons, kept.neurons, round_to)
    return [
        {"heads": heads, "neurons": stays}
        for heads, stays in zip(kept.heads, rounded_neurons, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Flap:
    """FLAP (An et al. 2024): remove the heads and neurons whose outputs fluctuate least.

    The bias of the linear that reads them makes up for their mean.

    Args:
      metric: Score of a channel: "IFV" its fluctuation, "WIFV" that times the squared norm of the
        weights that read it, "WIFN" Wanda's norm.
      structure: "UL-UM" removes the same share of every block, "UL-MM" `heads_removed` heads and
        the rest neurons alike in every block, "AL-MM" the same over all blocks together, "AL-AM"
        heads and neurons of all blocks in one list. None: "AL-AM" in the official variant, "UL-MM"
        in the corrected one.
      heads_removed: Heads of the whole model, for the "MM" structures. With 0, no more is removed
        than the neurons hold.
      spread: Largest difference between the fraction of its neurons that a block loses and the
        model's, for "AL-MM" in the corrected variant. 1: no limit, as in the paper. On SmolLM2-135M
        0.1 gives 49.8 at 30 % where blocks alike give 51.3, but blocks of different widths.
      bias: Add the mean output of what is removed to the bias of its reader.
      refit: Also fit the columns that stay to the dense output, by least squares over the
        calibration tokens; costs a second pass. None: in the corrected variant, unless bias=False.
      round_to: Keep a multiple of this many neurons in each block, as hardware likes it (8 to 128);
        0: as many as asked.
      variant: "official" is the authors' code to the letter (its fluctuation, squares,
        truncations). "corrected", the default, takes the true variance and the parameters that a
        unit really holds, and leaves one unit of each kind in every block. On SmolLM2-135M its
        defaults give perplexity 51.3 at 30 %, where the paper's structure with bias alone gives
        78.5 (docs/methods/flap.md).
    """

    metric: Metric = "WIFV"
    structure: Structure | None = None
    heads_removed: int = 0
    spread: float = 1.0
    bias: bool = True
    refit: bool | None = None
    round_to: int = 0
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.heads_removed < 0:
            raise InputError(f"flap: heads_removed={self.heads_removed} must not be negative")
        if not 0 <= self.spread <= 1:
            raise InputError(f"flap: spread={self.spread} must be from 0 to 1")
        if self.refit and not self.bias:
            raise InputError("flap: refit=True fits the bias too", "leave bias=False out")
        check_round_to("flap", self.round_to)

    @property
    def _official(self) -> bool:
        return self.variant == "official"

    @property
    def _structure(self) -> Structure:
        return self.structure or ("AL-AM" if self._official else "UL-MM")

    @property
    def _repair(self) -> Repair:
        refit = self.bias and not self._official if self.refit is None else self.refit
        if refit:
            return "refit"
        return "bias" if self.bias else "none"

    @property
    def shape_change(self) -> ShapeChange:
        """Return that heads and neurons are cut."""
        return ShapeChange(GROUPS, self._structure.startswith("UL"), self.bias)

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("flap", request)

    def _score(self, w: jax.Array, stats: Any) -> jax.Array:
        return _metrics(w, stats)[self.metric]

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        observer = official_fluctuation if self._official else moments
        key = ("flap", self.metric, self.variant)
        dense = _score_dense(
            model, tokens, runtime, observer, self._score, "measuring fluctuation", key
        )
        heads, neurons, sparsity = dense.heads, dense.neurons, request.sparsity
        if self._official and sparsity:
            kept = select_official(heads, neurons, sparsity, self._structure, self.heads_removed)
        else:  # the authors' code always removes something, so sparsity 0 takes this one
            to_remove = self.heads_removed if sparsity else 0
            kept = select_corrected(
                heads, neurons, sparsity, self._structure, to_remove, self.spread
            )
        keeps = _round_neurons(kept, neurons.metric, self.round_to)
        # A bias alone needs only the means, which the dense pass has measured.
        means = dense.means if self._repair == "bias" else None
        remove(model, tokens, runtime, sink, keeps, self._repair, means)
        label = f"{self.metric} of channels"
        return removed_outcome(model.arch, keeps, request, dense.by_reader, label)


@program("channels scored")
def _wanda_scores(w: jax.Array, norm: jax.Array) -> jax.Array:
    """Return the mean of |W_ij| ||X_j|| over a channel's column [in]."""
    return jnp.mean(jnp.abs(w.astype(jnp.float32)) * norm[None, :], axis=0)


@program("channels scored")
def _column_norms(w: jax.Array) -> jax.Array:
    """Return the L2 norm of every column [in]."""
    return jnp.sqrt(jnp.sum(w.astype(jnp.float32) ** 2, axis=0))


def _score_by_wanda(w: jax.Array, stats: Any) -> jax.Array:
    return _wanda_scores(w, np.sqrt(tree_to_host(stats).second.per_sample))


def _score_by_magnitude(w: jax.Array, stats: Any) -> jax.Array:
    return _column_norms(w)


@dataclasses.dataclass(frozen=True)
class ChannelMethod:
    """Method that removes heads and neurons by the sum of a score over each one's channels.

    With scope "local" one pass over the pruned blocks scores, repairs and cuts; with "global" a pass
    over the dense model comes first.

    Attributes:
      name: Name of the method, in messages; a journal takes scores of one name for the same.
      observer: `moments`, or None for a score of the weights alone.
      score: (W [out in] of a reader, Moments of its input if observed) -> score of each channel
        [in]; the lowest are removed.
      scores_label: Name of the scores, for the report.
      scope: "local" removes the same share of every block's heads and of its neurons; "global" the
        lowest of all by parameters removed, standardised within blocks.
      repair: Repair of the readers: "bias" adds the mean output of what is removed, "refit" fits
        what stays by least squares.
      round_to: Keep a multiple of this many neurons in each block; 0: as many as asked.
    """

    name: str
    observer: Observer | None
    score: ChannelScore
    scores_label: str
    scope: Scope = "local"
    repair: Repair = "none"
    round_to: int = 0

    def __post_init__(self) -> None:
        check_round_to(self.name, self.round_to)

    @property
    def shape_change(self) -> ShapeChange:
        """Return that heads and neurons are cut."""
        return ShapeChange(GROUPS, self.scope == "local", self.repair != "none")

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings(self.name, request)

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        choose = self._run_local if self.scope == "local" else self._run_global
        keeps, scores = choose(model, tokens, request, runtime, sink)
        return removed_outcome(model.arch, keeps, request, scores, self.scores_label)

    def _run_local(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> tuple[Sequence[Keep], Sequence[dict[str, np.ndarray]]]:
        """Score, repair and cut block after block; return the kept units and the scores."""
        arch = model.arch

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            # A refit observes (Moments, Gram); the score reads the moments.
            seen = {tap: s[0] for tap, s in stats.items()} if self.repair == "refit" else stats
            scores = _score_readers(model, block, seen, self.score)
            keep: dict[str, np.ndarray] = {}
            for group in map(arch.group, GROUPS):
                unit = scores[group.reader.name].reshape(-1, group.reader.width).sum(axis=1)
                stays = lowest(unit, int(request.sparsity * len(unit)))
                round_to = self.round_to if group.name == "neurons" else 0
                (keep[group.name],) = rounded([unit], [stays], round_to)
            block = repair_readers(arch, block, stats, keep, self.repair)
            block = remove_units(arch, block, keep)
            sink(i, block)
            return block, (keep, scores)

        observer = REPAIR_OBSERVERS[self.repair] or self.observer
        records = calibrate_readers(model, tokens, runtime, visit, observer, "pruned", "pruning")
        return [keep for keep, _ in records], [scores for _, scores in records]

    def _run_global(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> tuple[Sequence[Keep], Sequence[dict[str, np.ndarray]]]:
        """Score the dense model, then repair and cut; return the kept units and the scores."""
        dense = _score_dense(
            model, tokens, runtime, self.observer, self.score, "measuring channels", self.name
        )
        kept = select_corrected(dense.heads, dense.neurons, request.sparsity, "AL-AM", 0)
        keeps = _round_neurons(kept, dense.neurons.metric, self.round_to)
        remove(model, tokens, runtime, sink, keeps, self.repair)
        return keeps, dense.by_reader


def wanda_sp(scope: Scope = "local", repair: Repair = "none", round_to: int = 0) -> ChannelMethod:
    """Wanda-sp (An et al. 2024): remove heads and neurons by the mean Wanda score of their readers.

    Args:
      scope: "local" removes the same share of every block's heads and of its neurons; "global" the
        lowest of all by parameters removed, standardised within blocks.
      repair: Repair of the readers: "bias" adds the mean output of what is removed, "refit" fits
        what stays by least squares.
      round_to: Keep a multiple of this many neurons in each block; 0: as many as asked.
    """
    label = "Wanda's score of channels"
    return ChannelMethod("wanda_sp", moments, _score_by_wanda, label, scope, repair, round_to)


def magnitude_sp(
    scope: Scope = "local", repair: Repair = "none", round_to: int = 0
) -> ChannelMethod:
    """Magnitude-sp (An et al. 2024): remove heads and neurons by the norm of the columns reading them.

    Args:
      scope: "local" removes the same share of every block's heads and of its neurons; "global" the
        lowest of all by parameters removed, standardised within blocks.
      repair: Repair of the readers: "bias" adds the mean output of what is removed, "refit" fits
        what stays by least squares.
      round_to: Keep a multiple of this many neurons in each block; 0: as many as asked.
    """
    label = "norm of the columns"
    return ChannelMethod("magnitude_sp", None, _score_by_magnitude, label, scope, repair, round_to)
