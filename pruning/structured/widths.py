"""A choice of units whose blocks can be made wider or narrower, and what allocates their widths."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model
from models.errors import InputError
from pruning.allocation.width_core import Size
from pruning.figures import Figure
from pruning.structured.remove import Keep, Repair
from pruning.structured.select_core import keep_count
from pruning.structured.unit_scores import EXPERT_MULTIPLE, BlockUnits
from pruning.types import Outcome, Request, reject_weight_settings


class Part(NamedTuple):
    """Units of one kind in a block, and those that stay.

    Attributes:
      units: The units, with the scores of their channels.
      stays: Units that stay, bool [units].
    """

    units: BlockUnits
    stays: np.ndarray

    @property
    def size(self) -> Size:
        """Return how many there are, how many stay, and what each holds."""
        return Size(len(self.stays), int(self.stays.sum()), self.units.cost)

    def widened(self, more: int) -> "Part":
        """Return the part that keeps `more` units, fewer if negative; the worst go first."""
        if not more:
            return self
        scores = self.units.scores.astype(np.float64).reshape(len(self.stays), -1).sum(axis=1)
        return self._replace(stays=keep_count(scores, self.stays, self.size.kept + more))

    def keep(self) -> Keep:
        """Return the units that stay of each group."""
        return self.units.keep(self.stays)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Units that a method keeps in each block, in an order in which blocks would give them up.

    Attributes:
      parts: By block: kind -> its units.
      repair: Repair of the readers.
      round_to: Keep a multiple of this many neurons; 0: as many as asked.
      means: By block: tap -> mean of its channels, for a repair by the bias that needs no
        statistics of its own; None: the repair observes the pruned blocks.
    """

    parts: Sequence[Mapping[str, Part]]
    repair: Repair
    round_to: int = 0
    means: Sequence[Mapping[str, np.ndarray]] | None = None

    @property
    def multiple(self) -> int:
        """Return what numbers of kept neurons are a multiple of."""
        ranked = any(part.units.ranked for block in self.parts for part in block.values())
        return self.round_to or (EXPERT_MULTIPLE if ranked else 1)

    @property
    def sizes(self) -> list[dict[str, Size]]:
        """Return the size of every part, by block and kind."""
        return [{kind: part.size for kind, part in block.items()} for block in self.parts]

    def keeps(self) -> list[Keep]:
        """Return the units that stay, by block and group."""
        keeps: list[Keep] = []
        for block in self.parts:
            keeps.append({g: stays for part in block.values() for g, stays in part.keep().items()})
        return keeps

    def moved(self, more: Sequence[Mapping[str, int]]) -> "Selection":
        """Return the selection with other widths.

        Args:
          more: By block: kind -> units to keep more, fewer if negative.
        """
        parts = [
            {kind: part.widened(own[kind]) for kind, part in block.items()}
            for block, own in zip(self.parts, more, strict=True)
        ]
        return dataclasses.replace(self, parts=parts)

    def removed_shares(self) -> list[float]:
        """Return the share of each block's parameters that goes."""
        shares = []
        for block in self.sizes:
            gone = sum((s.units - s.kept) * s.cost for s in block.values())
            shares.append(gone / sum(s.units * s.cost for s in block.values()))
        return shares


class Widths(NamedTuple):
    """Widths of a model.

    Attributes:
      selection: Units that stay; as many weights go as in the choice that was given.
      details: Figures for the report, JSON-able.
      warnings: Sentences that the report's reader must see.
      figures: Plots and tables for the report.
    """

    selection: Selection
    details: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()

    def report(self, outcome: Outcome) -> Outcome:
        """Return the outcome with what the report says of the widths.

        Args:
          outcome: Outcome of the method that cut them.
        """
        return dataclasses.replace(
            outcome,
            details={**outcome.details, **self.details},
            warnings=(*outcome.warnings, *self.warnings),
            figures=(*outcome.figures, *self.figures),
        )


@runtime_checkable
class WidthAllocator(Protocol):
    """Allocator that also moves the units of a structured method between blocks."""

    def widths(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        selection: Selection,
    ) -> Widths:
        """Return widths of the blocks that remove as many weights as a method's own choice.

        Args:
          model: The dense model.
          tokens: Calibration windows, int [samples length].
          request: What to remove; its seed is that of anything random.
          runtime: How to execute.
          selection: Units that the method keeps.
        """


def allocate_widths(
    model: Model, tokens: np.ndarray, request: Request, runtime: Runtime, selection: Selection
) -> Widths:
    """Return the widths that the request's allocation gives; the method's own without one.

    Args:
      model: The dense model.
      tokens: Calibration windows, int [samples length].
      request: What to remove.
      runtime: How to execute.
      selection: Units that the method keeps.
    """
    allocation = request.allocation
    # At sparsity 0 nothing goes, so there is nothing to move.
    if not isinstance(allocation, WidthAllocator) or not request.sparsity:
        return Widths(selection, {})
    return allocation.widths(model, tokens, request, runtime, selection)


def check_width_settings(name: str, request: Request) -> None:
    """Raise InputError for settings that a method whose widths can be allocated cannot follow.

    Args:
      name: Name of the method.
      request: May have an allocation of widths; no pattern and no refinement.
    """
    allocation = request.allocation
    if allocation is not None and not isinstance(allocation, WidthAllocator):
        raise InputError(
            f"is for weight methods, and {name} removes whole units",
            "leave it out, or take evopress, which searches the widths of blocks",
            field="allocation",
        )
    reject_weight_settings(name, dataclasses.replace(request, allocation=None))
