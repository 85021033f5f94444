"""2SSP: remove neurons alike in every block, then whole attention parts one after the other."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.runtime import Runtime
from calibration.unit_norms import window_norms
from models.arch import Block, Model
from models.checkpoint.blocks import ChangedBlocks
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.sharding import tree_to_host
from pruning.structured.block_sizes import block_sizes, kept_neurons
from pruning.structured.channel_scores import by_reader
from pruning.structured.minitron_core import (
    BlockSize,
    dense_widths,
    neurons_for_budget,
    parameters,
)
from pruning.structured.remove import (
    ADDS_BIAS,
    GROUPS,
    Keep,
    Repair,
    calibrate_readers,
    check_round_to,
    remove,
    remove_units,
    removed_outcome,
)
from pruning.structured.select_core import drop_lowest
from pruning.structured.sleb_figures import search_details, search_figures, search_warnings
from pruning.structured.sleb_paths import Unit
from pruning.structured.sleb_runner import Runner, silenced
from pruning.structured.sleb_search import (
    SearchResult,
    given_units,
    search_units,
    writers_of,
)
from pruning.structured.unit_scores import block_units
from pruning.types import BlockSink, Outcome, Request, reject_weight_settings

KEY = "norms of neurons"
GIB = 1 << 30
# Room for hidden states between blocks, on the devices, on the host and on disk.
ROOM = (2 * GIB, 4 * GIB, 0)


class Plan(NamedTuple):
    """Sizes of a run, known from shapes alone.

    Attributes:
      attentions: Attention parts to remove.
      neurons: By block: neurons that stay.
    """

    attentions: int
    neurons: tuple[int, ...]


def attentions_to_remove(blocks: Sequence[BlockSize], sparsity: float, alpha: float) -> int:
    """Return the number of attention parts that go at a sparsity.

    Source: Sandri et al. 2025, eq. 5.

    Args:
      blocks: Units of each block.
      sparsity: Fraction of the parameters of the blocks to remove.
      alpha: Balance of the two stages; more removes more attention.
    """
    attention = sum(b.heads * b.head for b in blocks)
    feed_forward = sum(b.neurons * b.neuron for b in blocks)
    return round(len(blocks) * sparsity ** (feed_forward / attention / alpha))


def _neurons_left(blocks: Sequence[BlockSize], attentions: int, sparsity: float) -> float:
    """Return the share of neurons that meets the sparsity without some attention parts."""
    channels = 1  # both stages keep the stream
    budget = (1 - sparsity) * parameters(dense_widths(channels, blocks), blocks)
    # Blocks have as many heads each, so it does not matter which ones lose them.
    heads = [0] * attentions + [b.heads for b in blocks[attentions:]]
    return neurons_for_budget(channels, heads, blocks, budget)


@dataclasses.dataclass(frozen=True)
class TwoSSP:
    """2SSP (Sandri et al. 2025): remove neurons alike in every block, then attention parts.

    The first stage keeps the neurons of largest L2 norm over a window's tokens, in the mean over
    windows. The second removes the attention part whose absence gives the lowest loss, repeatedly.

    Args:
      alpha: Balance of the stages: of B blocks B * sparsity ** (r / alpha) lose their attention,
        where r is the ratio of the feed-forward part's parameters to attention's.
      attentions: Attention parts to remove; None: as `alpha` has it.
      windows: Calibration windows that the second stage measures losses on; 0: all.
      repair: Repair of the readers of removed neurons, after both stages: "bias" adds the mean
        output of what is removed, "refit" fits what stays by least squares, "refit_weights"
        without a bias, for every stock type. "none" as the authors' code.
      round_to: Keep a multiple of this many neurons; 0: as many as asked.
    """

    alpha: float = 1.5
    attentions: int | None = None
    windows: int = 4
    repair: Repair = "refit_weights"
    round_to: int = 0

    def __post_init__(self) -> None:
        for field, value in (("attentions", self.attentions or 0), ("windows", self.windows)):
            if value < 0:
                raise InputError(
                    "of two_ssp must not be negative", "give 0 or more", field=field, value=value
                )
        if not self.alpha > 0:
            raise InputError(
                "of two_ssp must be above 0", "give 1.5", field="alpha", value=self.alpha
            )
        check_round_to("two_ssp", self.round_to)

    def _plan(self, model: Model, request: Request) -> Plan:
        """Return the sizes; InputError where none meet the request."""
        blocks, sparsity = block_sizes(model), request.sparsity
        count = self.attentions
        if count is None:
            count = attentions_to_remove(blocks, sparsity, self.alpha)
        if count > len(blocks):
            raise InputError(
                f"of two_ssp is more than the {len(blocks)} blocks",
                "give fewer",
                field="attentions",
                value=count,
            )
        share = _neurons_left(blocks, count, sparsity)
        while self.attentions is None and count and share > 1:
            # The rule is for models whose feed-forward parts hold more than attention. Elsewhere it
            # may remove more than was asked for.
            count -= 1
            share = _neurons_left(blocks, count, sparsity)
        if not 0 < share <= 1 + 1e-9:
            raise InputError(
                f"cannot be met by two_ssp with {count} attention parts removed: it would keep "
                f"{share:.3g} of the neurons",
                "give other `attentions` or another sparsity",
                field="sparsity",
                value=sparsity,
            )
        return Plan(count, kept_neurons(model, blocks, share, self.round_to))

    def shape_change(self, model: Model) -> ShapeChange:
        """Return that neurons are cut alike, and heads in some blocks."""
        return ShapeChange(GROUPS, False, self.repair in ADDS_BIAS)

    @property
    def sets_sparsity(self) -> bool:
        """Return that the request sets the sparsity."""
        return False

    @property
    def reads_activations(self) -> bool:
        """Return that both stages measure activations."""
        return True

    @property
    def scores_key(self) -> Hashable:
        """Return what the first stage's scores depend on besides model and tokens."""
        return KEY

    def check(self, model: Model, request: Request) -> None:
        """Raise InputError for a request that the method cannot follow on this model."""
        reject_weight_settings("two_ssp", request)
        plan = self._plan(model, request)
        if plan.attentions and not model.arch.residual:
            raise InputError(
                "of two_ssp needs parts that only add to the residual stream; here a norm follows",
                "give 0",
                field="attentions",
                value=plan.attentions,
            )

    def _score(self, model: Model, tokens: np.ndarray, runtime: Runtime) -> list[dict[str, Any]]:
        """Return the scores of the dense model's neurons, by block and group."""
        arch = model.arch

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            groups = arch.groups_of(block, "neurons")
            return block, {
                g.name: tree_to_host(stats[arch.tap(g.reader.name)]).per_sample for g in groups
            }

        return calibrate_readers(
            model,
            tokens,
            runtime,
            visit,
            window_norms,
            "dense",
            "measuring neurons",
            ("neurons",),
            key=KEY,
        )

    def _search(
        self, model: Model, keeps: Sequence[Keep], tokens: np.ndarray, count: int, runtime: Runtime
    ) -> tuple[SearchResult, Runner | None]:
        """Return the attention parts to remove from the model without the dropped neurons."""
        arch = model.arch
        attention = arch.group("heads").reader.name
        units = {i: Unit(i, (attention,)) for i in range(len(model.blocks))}
        if not count:
            return given_units(len(units), units, (), writers_of(arch)), None

        def cut(i: int, block: Block) -> Block:
            return remove_units(arch, block, keeps[i])

        narrow = model._replace(blocks=ChangedBlocks(model.blocks, cut))
        windows = tokens[: self.windows] if self.windows else tokens
        runner = Runner(narrow, windows, runtime, ROOM)
        return search_units(runner, units, count, count, True, runtime), runner

    def run(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        sink: BlockSink,
    ) -> Outcome:
        """Prune the model, as `Method.run` says."""
        plan, arch = self._plan(model, request), model.arch
        scores = self._score(model, tokens, runtime)
        keeps: list[dict[str, np.ndarray]] = []
        for by_group, kept in zip(scores, plan.neurons, strict=True):
            units = block_units("neurons", by_group, 1.0)
            keeps.append(dict(units.keep(drop_lowest(units.scores, len(units.scores) - kept))))
        result, runner = self._search(model, keeps, tokens, plan.attentions, runtime)
        details = self._details(runner, result, len(keeps))
        runner = None  # its states and blocks need the memory that the repair may take
        for i, (block, keep) in enumerate(zip(block_sizes(model), keeps, strict=True)):
            keep["heads"] = np.full(block.heads, i not in result.removed)
        self._remove(model, tokens, runtime, sink, keeps, result.removed)
        readers = [by_reader(arch, by_group) for by_group in scores]
        outcome = removed_outcome(arch, keeps, request, readers, "mean norm of neurons")
        parts = [(i, "attention") for i in result.removed]
        figures = search_figures(details["losses"], result.removed, parts)
        return dataclasses.replace(
            outcome,
            details={**outcome.details, **details},
            # Parts are cut here, so that no zeros are left to warn of.
            warnings=tuple(search_warnings(result._replace(path=()))),
            figures=outcome.figures + figures,
        )

    def _details(self, runner: Runner | None, result: SearchResult, blocks: int) -> dict[str, Any]:
        """Return the figures of the second stage."""
        units = [Unit(i, ()) for i in range(blocks)]
        found = search_details(runner, result, units, False)
        names = ("losses", "stopped_at", "block_evaluations")
        return {"removed_attention": list(result.removed), **{n: found[n] for n in names}}

    def _remove(
        self,
        model: Model,
        tokens: np.ndarray,
        runtime: Runtime,
        sink: BlockSink,
        keeps: Sequence[Keep],
        removed: Sequence[int],
    ) -> None:
        """Repair and cut every block."""
        reader = model.arch.group("heads").reader.name

        def finish(i: int, block: Block) -> None:
            # Its bias would stay, unless a repair has set it to what the part adds in the mean.
            if i in removed and self.repair not in ADDS_BIAS:
                block = silenced(block, (reader,))
            sink(i, block)

        remove(model, tokens, runtime, finish, keeps, self.repair)
