"""Budgets of a model: an even one, and any other made to meet the sparsity to one unit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model, experts_of, linear_of
from models.checkpoint.blocks import LazyBlocks
from pruning.budget_core import (
    clip_fractions,
    fraction_for_count,
    shift_to_sparsity,
    whole_counts,
)
from pruning.types import Allocation, Budget, Layerwise, Request

Shapes = Sequence[Mapping[str, tuple[int, int]]]  # by block: slot -> (out, in)


def shapes_of(model: Model, block: Any) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every slot of a block.

    Args:
      model: Its architecture names the slots.
      block: Parameters, or their specs.
    """
    slots = model.arch.slots_of(block)
    return {slot.name: linear_of(block, slot.name).w.shape for slot in slots}


def all_shapes(model: Model) -> Shapes:
    """Return `shapes_of` every block without reading weights."""
    # Specs: a lazy block that is indexed reads its weights.
    blocks = model.blocks.specs if isinstance(model.blocks, LazyBlocks) else model.blocks
    return [shapes_of(model, block) for block in blocks]


def all_experts(model: Model) -> list[int]:
    """Return the number of experts of every block, without reading weights."""
    blocks = model.blocks.specs if isinstance(model.blocks, LazyBlocks) else model.blocks
    return [experts_of(block) for block in blocks]


def by_block(model: Model, fractions: np.ndarray) -> Budget:
    """Return the budget that gives all linears of a block the same fraction.

    Args:
      model: Its architecture names the slots.
      fractions: Fraction to remove from each block, [blocks].
    """
    # float64, because counts are truncated products: float32 could be off by one.
    return tuple(
        dict.fromkeys(shapes, np.asarray(f, np.float64))
        for shapes, f in zip(all_shapes(model), fractions, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Allocator of the same fraction to every linear."""

    @property
    def reads_activations(self) -> bool:
        """Return that the fraction is the request's."""
        return False

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate evenly, as `Allocator` says."""
        return Allocation(by_block(model, np.full(len(model.blocks), request.sparsity)))


def meet_sparsity(budget: Budget, shapes: Shapes, sparsity: float) -> Budget:
    """Return the budget nearest to the given one that removes the sparsity to one unit.

    All fractions move by the same amount, are kept within bounds, and become whole entries. A unit
    is one entry of each row of a linear, or of one row where rows have their own fractions.

    Args:
      budget: Fractions, () or [out], not bounded.
      shapes: Shapes of the same slots.
      sparsity: Fraction to remove of all weights.

    Returns:
      A budget of the same layout.
    """
    fractions, columns, weights = [], [], []
    for block, block_shapes in zip(budget, shapes, strict=True):
        for slot, fraction in block.items():
            rows, inputs = block_shapes[slot]
            own = np.atleast_1d(fraction)
            fractions.append(own)
            columns.append(np.full(len(own), inputs))
            # One fraction of a whole linear counts for all of its rows.
            weights.append(np.full(len(own), 1 if np.ndim(fraction) else rows))
    flat = np.concatenate(fractions), np.concatenate(columns), np.concatenate(weights)
    # All units at once. Budgets that each block rounds alone would miss the model's sparsity.
    bounded = shift_to_sparsity(*flat, sparsity)
    counts = whole_counts(bounded, flat[1], flat[2], sparsity)
    ends = np.cumsum([len(own) for own in fractions])[:-1]
    parts = iter(np.split(fraction_for_count(counts, flat[1]), ends))
    met = []
    for block in budget:
        met.append({slot: next(parts).reshape(np.shape(f)) for slot, f in block.items()})
    return tuple(met)


def budget_of_blocks(
    model: Model, fractions: np.ndarray, sparsity: float, official: bool
) -> Budget:
    """Return the budget of blocks' fractions as allocators round it.

    Args:
      model: Its architecture names the slots.
      fractions: Fraction to remove from each block, [blocks], not bounded.
      sparsity: Fraction to remove of all weights.
      official: Clip each fraction alone, as the authors' codes do. Nothing makes up for that, so
        the budget may miss the sparsity. Otherwise it meets the sparsity to one unit.
    """
    if official:
        return by_block(model, clip_fractions(fractions))
    return meet_sparsity(by_block(model, fractions), all_shapes(model), sparsity)


def mean_fractions(budget: Budget) -> tuple[dict[str, float], ...]:
    """Return the fraction to remove of every slot, the mean of its rows, by block."""
    return tuple(
        {name: float(np.mean(fraction)) for name, fraction in block.items()} for block in budget
    )


def block_sparsities(budget: Budget, shapes: Shapes) -> list[float]:
    """Return the fraction that each block loses of its prunable weights.

    Args:
      budget: Fractions, () or [out].
      shapes: Shapes of the same slots.
    """
    means = []
    for fractions, block in zip(budget, shapes, strict=True):
        sizes = [np.prod(block[slot]) for slot in fractions]
        means.append(float(np.average([np.mean(f) for f in fractions.values()], weights=sizes)))
    return means
