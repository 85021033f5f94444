"""FLAP: remove the heads and neurons that fluctuate least; a bias makes up for their mean."""

import dataclasses
from collections.abc import Hashable
from typing import Any, Literal

import jax
import numpy as np

from calibration.moments import moments
from calibration.runtime import Runtime
from models.arch import Model
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import Program
from pruning.structured.channel_scores import DenseScores, score_dense
from pruning.structured.flap_core import (
    Kept,
    Metric,
    Structure,
    input_feature_metrics,
    official_fluctuation,
    select_corrected,
    select_official,
)
from pruning.structured.refit_errors import compares_errors, score_with_errors
from pruning.structured.remove import (
    ADDS_BIAS,
    GROUPS,
    Repair,
    check_round_to,
    remove,
    removed_outcome,
    units_per_block,
)
from pruning.structured.widths import Selection, allocate_widths, check_width_settings
from pruning.types import (
    BlockSink,
    Outcome,
    Request,
    reject_experts,
)

# Head groups a block from which heads and neurons compete in one list: one group is then at most an
# eighth of a block's attention (docs/decisions/032-flap-head-groups.md).
LIST_HEAD_GROUPS = 8

# A block that loses much more than the others changes what all blocks behind it see, which errors
# measured on the dense model do not tell.
ERROR_SPREAD = 0.1

_metrics = Program(input_feature_metrics, "channels scored")


@dataclasses.dataclass(frozen=True)
class Flap:
    """FLAP (An et al. 2024): remove the heads and neurons whose outputs fluctuate least.

    The bias of the linear that reads them makes up for their mean.

    Args:
      metric: Score of a channel: "IFV" its fluctuation, "WIFV" that times the squared norm of the
        weights that read it, "WIFN" Wanda's norm.
      structure: "UL-UM" removes the same share of every block, "UL-MM" `heads_removed` heads and
        the rest neurons alike in every block, "AL-MM" the same over all blocks together, "AL-AM"
        heads and neurons of all blocks in one list. None: "AL-AM" in the official variant. In the
        corrected one "AL-AM" for models with eight or more head groups a block (key-value heads
        with grouped-query attention), "AL-MM" by errors for models with fewer, and "UL-MM" with
        `heads_removed`, without a refit, or where errors do not compare.
      heads_removed: Heads of the whole model, for the "MM" structures. With 0, no more is removed
        than the neurons hold.
      compare: Comparison of blocks in the "AL" structures: "score" by scores that are standardised
        within each, as in the paper; "error" by the error that a refit leaves of the stream, the
        least in sum. It needs branches that add to the stream as they are, and no experts. None:
        "error" where the model chose "AL-MM", else "score".
      spread: Largest difference between the fraction of its neurons that a block loses and the
        model's, for "AL-MM" in the corrected variant. 1: no limit, as in the paper. Where errors
        compare blocks, it limits only how much more one loses. None: 0.1 there, else 1.
      bias: Add the mean output of what is removed to the bias of its reader. Some stock types have
        no such bias, and experts never have one.
      refit: Also fit the columns that stay to the dense output, by least squares over the
        calibration tokens; costs a second pass. None: in the corrected variant, unless bias=False.
        With bias=False the columns alone are fitted, so that every stock type holds the result.
      round_to: Keep a multiple of this many neurons in each block, as hardware likes it (8 to 128);
        0: as many as asked.
      variant: "official" is the authors' code to the letter (its fluctuation, squares,
        truncations). "corrected", the default, takes the true variance and the parameters that a
        unit really holds, and leaves one unit of each kind in every block. On SmolLM2-135M its
        defaults give perplexity 46.9 at 30 %, where the paper's structure with bias alone gives
        78.5 (docs/methods/flap.md).
    """

    metric: Metric = "WIFV"
    structure: Structure | None = None
    heads_removed: int = 0
    compare: Literal["score", "error"] | None = None
    spread: float | None = None
    bias: bool = True
    refit: bool | None = None
    round_to: int = 0
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.heads_removed < 0:
            raise InputError(
                "of flap must not be negative",
                "give 0 to remove neurons alone",
                field="heads_removed",
                value=self.heads_removed,
            )
        if self.spread is not None and not 0 <= self.spread <= 1:
            raise InputError(
                "of flap must lie between 0 and 1",
                "give 1 for no limit",
                field="spread",
                value=self.spread,
            )
        if self.compare == "error" and self._official:
            raise InputError(
                "flap: the official code compares standardised scores", 'use compare="score"'
            )
        check_round_to("flap", self.round_to)

    @property
    def _official(self) -> bool:
        return self.variant == "official"

    def _choose_structure(self, model: Model) -> tuple[Structure, str]:
        """Return the structure, and the rule that gave it; reads no parameters."""
        if self.structure:
            return self.structure, "as asked"
        if self._official:
            return "AL-AM", "the authors' default"
        if self.heads_removed:
            return "UL-MM", "`heads_removed` is given"
        groups = units_per_block(model, "heads")
        if groups >= LIST_HEAD_GROUPS:
            return "AL-AM", f"{groups:.3g} head groups a block, {LIST_HEAD_GROUPS} or more"
        # With few groups the list takes whole thirds or halves of a block's attention. On SmolLM2
        # it takes 16 of 90 at 30 %, and neurons alone do better with a refit.
        rule = f"{groups:.3g} head groups a block, fewer than {LIST_HEAD_GROUPS}"
        return "AL-MM" if self._may_compare_errors(model) else "UL-MM", rule

    def _may_compare_errors(self, model: Model) -> bool:
        """Return whether errors of refits compare blocks where the choice is left to the model."""
        if self.compare:
            return self.compare == "error"
        return self._repair in ("refit", "refit_weights") and compares_errors(model.arch)

    def _compares_errors(self, model: Model) -> bool:
        """Return whether errors of refits compare blocks; reads no parameters."""
        structure, _ = self._choose_structure(model)
        if self.compare or self.structure:  # a structure as asked compares as in the paper
            return self.compare == "error" and structure.startswith("AL")
        return structure == "AL-MM"

    @property
    def _repair(self) -> Repair:
        # A refit fits the bias as well, so it needs no repair by the bias before it.
        refit = self.bias and not self._official if self.refit is None else self.refit
        if refit:
            return "refit" if self.bias else "refit_weights"
        return "bias" if self.bias else "none"

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that heads and neurons are cut."""
        structure, _ = self._choose_structure(model)
        # UL structures leave all blocks the same widths, so that a stock architecture holds them.
        return ShapeChange(GROUPS, structure.startswith("UL"), self._repair in ADDS_BIAS)

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return that every metric is one of activations."""
        return True

    @property
    def scores_key(self) -> Hashable:
        """Return what the scores depend on besides model and tokens."""
        return ("flap", self.metric, self.variant)

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        check_width_settings("flap", request)
        if self._official:
            reject_experts("flap", model)
        if self.compare == "error" and not compares_errors(model.arch):
            raise InputError(
                "flap: the errors of blocks are on one scale only where branches add to the stream "
                "as they are, and without experts",
                'use compare="score"',
            )

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
        dense = self._measure(model, tokens, runtime)
        structure, rule = self._choose_structure(model)
        # A bias alone needs only the means, which the dense pass has measured.
        means = dense.means if self._repair == "bias" else None

        def choose(sparsity: float) -> Selection:
            kept = self._choose(dense, sparsity, structure)
            return dense.selection(kept, self._repair, self.round_to, means)

        request = request.settled(lambda sparsity: choose(sparsity).keeps())
        own = choose(request.sparsity)
        widths = allocate_widths(model, tokens, request, runtime, own)
        keeps = widths.selection.keeps()
        remove(model, tokens, runtime, sink, keeps, self._repair, means)
        label = f"{self.metric} of channels"
        outcome = removed_outcome(model.arch, keeps, request, dense.by_reader, label)
        return self._say_structure(widths.report(outcome), structure, rule)

    def _measure(self, model: Model, tokens: np.ndarray, runtime: Runtime) -> DenseScores:
        """Return scores of the dense model, with errors of refits where these compare blocks."""
        name, key = "measuring fluctuation", self.scores_key
        if self._compares_errors(model):
            key = (key, "errors")
            return score_with_errors(model, tokens, runtime, self._score, name, key)
        # Both also have the means, which a repair by the bias takes from this pass.
        observer = official_fluctuation if self._official else moments
        return score_dense(model, tokens, runtime, observer, self._score, name, key)

    def _choose(self, dense: DenseScores, sparsity: float, structure: Structure) -> Kept:
        """Return the units that stay."""
        heads, neurons = dense.lists()
        if self._official and sparsity:
            return select_official(heads, neurons, sparsity, structure, self.heads_removed)
        # The authors' code always removes something, so sparsity 0 takes this one. Heads are a
        # number, not a share of the sparsity; at 0 nothing may be removed.
        to_remove = self.heads_removed if sparsity else 0
        spread = self.spread
        if spread is None:
            spread = 1.0 if neurons.errors is None else ERROR_SPREAD
        return select_corrected(heads, neurons, sparsity, structure, to_remove, spread)

    def _say_structure(self, outcome: Outcome, structure: Structure, rule: str) -> Outcome:
        """Return the outcome with the structure and its rule, in a note where the model decides."""
        details = {**outcome.details, "structure": {"used": structure, "rule": rule}}
        chosen = self.structure is None and not self._official
        notes = (f"flap used structure={structure}: {rule}",) if chosen else ()
        return dataclasses.replace(outcome, details=details, notes=notes)
