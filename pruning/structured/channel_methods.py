"""Wanda-sp, magnitude-sp and any other method that scores heads and neurons by their channels."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibration.moments import moments
from calibration.observers import Observer
from calibration.runtime import Runtime
from models.arch import Block, Model
from models.checkpoint.output_format import ShapeChange
from models.programs import program
from models.sharding import tree_to_host
from pruning.structured.channel_scores import (
    ChannelScore,
    by_reader,
    score_dense,
    score_groups,
    unit_cost,
)
from pruning.structured.flap_core import select_corrected
from pruning.structured.remove import (
    ADDS_BIAS,
    GROUPS,
    REPAIR_OBSERVERS,
    Repair,
    calibrate_readers,
    check_round_to,
    remove,
    remove_units,
    removed_outcome,
    repair_readers,
)
from pruning.structured.select_core import drop_lowest
from pruning.structured.unit_scores import block_units
from pruning.structured.widths import Selection, allocate_widths, check_width_settings
from pruning.types import BlockSink, Outcome, Request, reject_weight_settings

Scope = Literal["local", "global"]


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

    With scope "local" one pass over the pruned blocks scores, repairs and cuts; with "global" a
    pass over the dense model comes first.

    Attributes:
      name: Name of the method, in messages; a journal takes scores of one name for the same.
      observer: `moments`, or None for a score of the weights alone.
      score: (W [out in] of a reader, Moments of its input if observed) -> score of each channel
        [in]; the lowest are removed.
      scores_label: Name of the scores, for the report.
      scope: "local" removes the same share of every block's heads and of its neurons; "global" the
        lowest of all by parameters removed, standardised within blocks.
      repair: Repair of the readers: "bias" adds the mean output of what is removed, "refit" fits
        what stays by least squares, "refit_weights" without a bias, for every stock type.
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

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that heads and neurons are cut."""
        # A choice over the model leaves blocks of different widths.
        return ShapeChange(GROUPS, self.scope == "local", self.repair in ADDS_BIAS)

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return whether the score or the repair needs statistics of the inputs."""
        return (self.observer or REPAIR_OBSERVERS[self.repair]) is not None

    @property
    def scores_key(self) -> Hashable:
        """Return what the scores depend on besides model and tokens; None for "local"."""
        # A local score is one of what the blocks pruned before it give.
        return self.name if self.scope == "global" and self.observer else None

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        if self.scope == "global":
            check_width_settings(self.name, request)
        else:  # blocks are scored and cut in one pass, so none can wait for another
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
        if self.scope == "global":
            return self._run_global(model, tokens, request, runtime, sink)
        return self._run_local(model, tokens, request, runtime, sink)

    def _run_local(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Score, repair and cut block after block."""
        arch = model.arch

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            # A refit observes (Moments, Gram); the score reads the moments.
            fitted = self.repair in ("refit", "refit_weights")
            seen = {tap: s[0] for tap, s in stats.items()} if fitted else stats
            scores = score_groups(arch, block, seen, self.score)
            keep: dict[str, np.ndarray] = {}
            for kind in GROUPS:
                units = block_units(kind, scores, unit_cost(arch, block, kind))
                width = arch.groups_of(block, kind)[0].reader.width
                # Sums, not means: heads compete with heads alone, and all have as many channels.
                summed = units.scores.reshape(-1, width).sum(axis=1)
                # Truncated, as the official code counts.
                stays = drop_lowest(summed, int(request.sparsity * len(summed)))
                # Heads are few, and their width suits the hardware already.
                if kind == "neurons":
                    stays = units.round_kept(stays, self.round_to)
                keep |= units.keep(stays)
            # Repair before the cut: statistics have an entry for every dense channel.
            block = repair_readers(arch, block, stats, keep, self.repair)
            block = remove_units(arch, block, keep)
            sink(i, block)
            return block, (keep, by_reader(arch, scores))

        # Observers of repairs include the moments that scores read.
        observer = REPAIR_OBSERVERS[self.repair] or self.observer
        # Pruned outputs feed the next block, as in the official wanda_sp. FLAP itself goes by dense
        # ones.
        records = calibrate_readers(model, tokens, runtime, visit, observer, "pruned", "pruning")
        keeps, scores = [keep for keep, _ in records], [scores for _, scores in records]
        return removed_outcome(arch, keeps, request, scores, self.scores_label)

    def _run_global(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Score the dense model, then repair and cut."""
        dense = score_dense(
            model, tokens, runtime, self.observer, self.score, "measuring channels", self.name
        )

        def choose(sparsity: float) -> Selection:
            # "AL-AM" removes no fixed number of heads.
            kept = select_corrected(*dense.lists(), sparsity, "AL-AM", 0)
            return dense.selection(kept, self.repair, self.round_to)

        request = request.settled(lambda sparsity: choose(sparsity).keeps())
        own = choose(request.sparsity)
        widths = allocate_widths(model, tokens, request, runtime, own)
        keeps = widths.selection.keeps()
        # A repair observes anew: its inputs come from the pruned blocks before it.
        remove(model, tokens, runtime, sink, keeps, self.repair)
        outcome = removed_outcome(model.arch, keeps, request, dense.by_reader, self.scores_label)
        return widths.report(outcome)


def wanda_sp(scope: Scope = "local", repair: Repair = "none", round_to: int = 0) -> ChannelMethod:
    """Wanda-sp (An et al. 2024): remove heads and neurons by the mean Wanda score of their readers.

    Args:
      scope: "local" removes the same share of every block's heads and of its neurons; "global" the
        lowest of all by parameters removed, standardised within blocks.
      repair: Repair of the readers: "bias" adds the mean output of what is removed, "refit" fits
        what stays by least squares, "refit_weights" without a bias, for every stock type.
      round_to: Keep a multiple of this many neurons in each block; 0: as many as asked.
    """
    label = "Wanda's score of channels"
    return ChannelMethod("wanda_sp", moments, _score_by_wanda, label, scope, repair, round_to)


def magnitude_sp(
    scope: Scope = "local", repair: Repair = "none", round_to: int = 0
) -> ChannelMethod:
    """Magnitude-sp (An et al. 2024): remove heads and neurons by the norms of their readers.

    Args:
      scope: "local" removes the same share of every block's heads and of its neurons; "global" the
        lowest of all by parameters removed, standardised within blocks.
      repair: Repair of the readers: "bias" adds the mean output of what is removed, "refit" fits
        what stays by least squares, "refit_weights" without a bias, for every stock type.
      round_to: Keep a multiple of this many neurons in each block; 0: as many as asked.
    """
    label = "norm of the columns"
    return ChannelMethod("magnitude_sp", None, _score_by_magnitude, label, scope, repair, round_to)
