"""Minitron: the same narrower width in every block, the residual stream included."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from calibration.runtime import Runtime
from models.arch import Block, Model
from models.checkpoint.output_format import Shape, ShapeChange
from models.errors import InputError
from models.sharding import place
from models.stream import cut_non_block, narrow_blocks, width_of
from pruning.budget import all_experts
from pruning.structured.block_sizes import block_sizes, kept_neurons
from pruning.structured.channel_scores import by_reader
from pruning.structured.minitron_core import (
    BlockSize,
    Widths,
    channel_scores,
    dense_widths,
    heads_for_budget,
    kept_count,
    neurons_for_budget,
    norm_gain,
    parameters,
    removed_share,
    unit_scores,
)
from pruning.structured.minitron_scores import KEY, gains_of, score_model
from pruning.structured.remove import (
    ADDS_BIAS,
    GROUPS,
    Keep,
    Repair,
    check_round_to,
    remove,
    removed_outcome,
)
from pruning.structured.select_core import drop_lowest
from pruning.structured.unit_scores import block_units
from pruning.types import (
    BlockSink,
    Outcome,
    Request,
    dropped_indices,
    reject_weight_settings,
)


class Plan(NamedTuple):
    """Widths of a run, known from shapes alone.

    Attributes:
      kept: Units that stay.
      dense: Units of the dense model.
      blocks: What units of each block hold.
    """

    kept: Widths
    dense: Widths
    blocks: list[BlockSize]

    @property
    def removed(self) -> float:
        """Return the share of the parameters of the blocks' linears that is removed."""
        return removed_share(self.kept, self.dense, self.blocks)


@dataclasses.dataclass(frozen=True)
class Minitron:
    """Minitron (Muralidharan et al. 2024): one narrower width for all blocks, stream included.

    Scores are activations: the mean over tokens of the norm of a head group's output, of a neuron
    or of a channel that a norm gives, and the norm of that over windows.

    Args:
      hidden: Share of the residual channels that stays.
      heads: Share of every block's head groups that stays. None: all, unless less than a quarter
        of the neurons would meet the sparsity; as `hidden` where the stock class needs heads that
        make up the hidden size.
      neurons: Share of every block's neurons that stays; None: what meets the request's sparsity.
      gain: Scale each norm's gain, so that the channels that stay are as large behind it as before.
      repair: Repair of the readers of removed heads and neurons: "bias" adds the mean output of
        what is removed, "refit" fits what stays by least squares, "refit_weights" without a bias,
        for every stock type.
      round_to: Keep a multiple of this many neurons; 0: as many as asked.
    """

    hidden: float = 1.0
    heads: float | None = None
    neurons: float | None = None
    gain: bool = True
    repair: Repair = "refit_weights"
    round_to: int = 0

    def __post_init__(self) -> None:
        for field in ("hidden", "heads", "neurons"):
            share = getattr(self, field)
            if share is not None and not 0 < share <= 1:
                raise InputError(
                    "of minitron must lie above 0 and not above 1",
                    "give the share that stays, such as 0.75",
                    field=field,
                    value=share,
                )
        check_round_to("minitron", self.round_to)

    def _channels(self, model: Model) -> int:
        """Return the channels that stay, a number that stock heads go with."""
        total = width_of(model.non_block)
        return kept_count(self.hidden, total, model.arch.config.stream_multiple)

    def _heads(
        self, model: Model, blocks: Sequence[BlockSize], budget: float | None = None
    ) -> tuple[int, ...]:
        """Return the head groups of every block that stay, all where a budget would decide."""
        channels, total, share = self._channels(model), width_of(model.non_block), self.heads
        if share is None and channels < total and model.arch.config.heads_fill_stream:
            share = channels / total
        if share is None and budget is not None:
            return heads_for_budget(channels, blocks, budget)
        return tuple(kept_count(1.0 if share is None else share, b.heads) for b in blocks)

    def _plan(self, model: Model, request: Request) -> Plan:
        """Return the widths; InputError where none meets the request."""
        blocks = block_sizes(model)
        dense = dense_widths(width_of(model.non_block), blocks)
        channels, neurons = self._channels(model), self.neurons
        heads = self._heads(model, blocks)
        if neurons is None:
            budget = (1 - request.sparsity) * parameters(dense, blocks)
            heads = self._heads(model, blocks, budget)
            neurons = neurons_for_budget(channels, heads, blocks, budget)
            least = removed_share(Widths(channels, heads, dense.neurons), dense, blocks)
            _check_budget(neurons, least, request)
        kept = kept_neurons(model, blocks, neurons, self.round_to)
        return Plan(Widths(channels, heads, kept), dense, blocks)

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that heads, neurons and channels are cut alike in every block."""
        change = ShapeChange(GROUPS, True, self.repair in ADDS_BIAS)
        if self.hidden == 1:
            return change
        blocks = block_sizes(model)
        # Neurons depend on the request, but every stock type holds any number of them.
        shapes = tuple(
            Shape(kept, b.neurons, experts)
            for kept, b, experts in zip(
                self._heads(model, blocks), blocks, all_experts(model), strict=True
            )
        )
        return change._replace(hidden=self._channels(model), shapes=shapes)

    @property
    def sets_sparsity(self) -> bool:
        """Return whether `neurons` sets the size."""
        return self.neurons is not None

    @property
    def reads_activations(self) -> bool:
        """Return that scores are activations."""
        return True

    @property
    def scores_key(self) -> Hashable:
        """Return what the scores depend on besides model and tokens."""
        return KEY

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("minitron", request)
        if self.neurons is not None and request.sparsity:
            raise InputError(
                "of minitron sets the size, and so does `sparsity`",
                "leave one of them out",
                field="neurons",
                value=self.neurons,
            )
        plan = self._plan(model, request)
        if plan.kept.channels < plan.dense.channels and not model.arch.residual:
            raise InputError(
                "of minitron needs blocks that add to the stream; here a norm follows each sum",
                "leave it out",
                field="hidden",
                value=self.hidden,
            )

    def _select(self, plan: Plan, records: Sequence[Mapping[str, Any]]) -> list[Keep]:
        """Return the heads and neurons that stay, by block and group."""
        keeps: list[Keep] = []
        for i, record in enumerate(records):
            scores, keep = unit_scores(record["units"]), dict[str, np.ndarray]()
            for kind, kept in zip(GROUPS, (plan.kept.heads, plan.kept.neurons), strict=True):
                units = block_units(kind, scores, 1.0)
                keep |= units.keep(drop_lowest(units.scores, len(units.scores) - kept[i]))
            keeps.append(keep)
        return keeps

    def _narrow(
        self,
        model: Model,
        records: Sequence[Mapping[str, Any]],
        keep: np.ndarray,
        mesh: Mesh | None,
    ) -> Model:
        """Return the model without the other channels of the stream."""
        if keep.all():
            return model
        arch = model.arch

        def gains(i: int, block: Block) -> Mapping[str, float]:
            return gains_of(arch, block, records[i], keep) if self.gain else {}

        last = norm_gain(records[-1]["final"].astype(np.float64), keep) if self.gain else 1.0
        non_block = cut_non_block(arch, place(model.non_block, mesh), keep, last)
        return model._replace(non_block=non_block, blocks=narrow_blocks(model, keep, gains))

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        plan = self._plan(model, request)
        records = score_model(model, tokens, runtime)
        channels = channel_scores([s["norms"] for r in records for s in r["stream"].values()])
        keep = drop_lowest(channels, len(channels) - plan.kept.channels)
        keeps = self._select(plan, records)
        narrow = self._narrow(model, records, keep, runtime.mesh)
        remove(narrow, tokens, runtime, sink, keeps, self.repair)
        return self._outcome(model, narrow, plan, request, keep, keeps, records)

    def _outcome(
        self,
        model: Model,
        narrow: Model,
        plan: Plan,
        request: Request,
        keep: np.ndarray,
        keeps: list[Keep],
        records: Sequence[Mapping[str, Any]],
    ) -> Outcome:
        """Return the outcome: what stays, and the scores."""
        arch = model.arch
        scores = [by_reader(arch, unit_scores(record["units"])) for record in records]
        outcome = removed_outcome(arch, keeps, request, scores, "activation of units")
        gone = dropped_indices(keep)
        removed = []
        for linears in outcome.removed:
            writers = {s.name for s in arch.slots if s.feeds == "next"}
            removed.append(
                {
                    name: r._replace(rows=gone) if name in writers else r._replace(columns=gone)
                    for name, r in linears.items()
                }
            )
        share = plan.removed if self.sets_sparsity else request.sparsity
        widths = {
            "channels": plan.kept.channels,
            "heads": list(plan.kept.heads),
            "neurons": list(plan.kept.neurons),
        }
        kept = {"kept_channels": np.flatnonzero(keep).tolist(), "widths": widths}
        return dataclasses.replace(
            outcome,
            asked=tuple(dict.fromkeys(linears, share) for linears in removed),
            removed=tuple(removed),
            non_block=None if narrow is model else narrow.non_block,
            details={**outcome.details, **kept},
        )


def _check_budget(neurons: float, least: float, request: Request) -> None:
    """Raise InputError unless a share of the neurons meets the budget."""
    if neurons > 1 + 1e-9:
        raise InputError(
            f"is less than `hidden` and `heads` of minitron remove, {least:.4g}",
            "give more, or a larger `hidden` or `heads`",
            field="sparsity",
            value=request.sparsity,
        )
    if neurons <= 0:
        raise InputError(
            "is more than all neurons of minitron hold",
            "give a smaller `hidden` or `heads` too",
            field="sparsity",
            value=request.sparsity,
        )
