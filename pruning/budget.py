"""Budgets: the same everywhere, and fractions of any origin made to meet the sparsity asked for to one unit."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model
from models.checkpoint.blocks import LazyBlocks
from pruning.types import Allocation, Budget, Layerwise, Request

LEAST, MOST = (
    0.01,
    0.99,
)  # of what a linear or row may lose, where the model as a whole loses something between

Shapes = Sequence[Mapping[str, tuple[int, int]]]  # a block's {slot: (out, in)}


def shapes_of(model: Model, block: Any) -> dict[str, tuple[int, int]]:
    """{slot: (out, in)} of a block, or of its specs."""
    return {slot.name: getattr(block, slot.name).w.shape for slot in model.arch.slots}


def all_shapes(model: Model) -> Shapes:
    """`shapes_of` every block; no weights are read for it."""
    blocks = model.blocks.specs if isinstance(model.blocks, LazyBlocks) else model.blocks
    return [shapes_of(model, block) for block in blocks]


def by_block(model: Model, fractions: np.ndarray) -> Budget:
    """The same fraction of every linear of a block, from fractions [blocks]."""
    return tuple(
        {slot.name: np.asarray(f, np.float64) for slot in model.arch.slots} for f in fractions
    )


def uniform(
    model: Model, tokens: np.ndarray, request: Request, runtime: Runtime, layerwise: Layerwise
) -> Allocation:
    """The same fraction of every prunable linear, whatever the tokens and the method."""
    return Allocation(by_block(model, np.full(len(model.blocks), request.sparsity)))


def spread(scores: np.ndarray, sparsity: float, lam: float) -> np.ndarray:
    """Fractions to remove [n] of mean `sparsity`: densities linear in the scores [n], 2 lam from the lowest to the highest.

    In the order of operations of OWL's and NeuroAL's code: its last bits decide how many whole entries a fraction is.
    """
    scores = scores.astype(np.float64)
    span = np.ptp(scores)
    if span == 0:
        return np.full(len(scores), sparsity, np.float64)
    density = (scores - scores.min()) * (1 / span * lam * 2)
    return 1 - (density - density.mean() + (1 - sparsity))


def within(asked: np.ndarray) -> np.ndarray:
    """0.01 for what is not above 0, 0.99 for what is not below 1: how the released code of OWL and NeuroAL clips."""
    return np.where(asked <= 0, LEAST, np.where(asked >= 1, MOST, asked))


def fraction_of(count: np.ndarray, total: np.ndarray | int) -> np.ndarray:
    """The least float64 fraction of which `int(fraction * total)`, as patterns count, is `count`."""
    fraction = np.asarray(count, np.float64) / total
    return np.where(
        (fraction * total).astype(np.int64) < count, np.nextafter(fraction, 2), fraction
    )


class _Units(NamedTuple):
    """Everything that has a fraction of its own, [n] each: a whole linear, or one of its rows.

    columns: inputs; one entry of each row less is the smallest change. weights: how many weights that is.
    """

    fraction: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    @property
    def size(self) -> np.ndarray:
        return self.columns * self.weights


def _units(budget: Budget, shapes: Shapes) -> _Units:
    parts = []
    for fractions, block in zip(budget, shapes, strict=True):
        for slot, f in fractions.items():
            rows, columns = block[slot]
            own = np.atleast_1d(f)
            parts.append(
                (own, np.full(len(own), columns), np.full(len(own), 1 if np.ndim(f) else rows))
            )
    return _Units(*(np.concatenate(p) for p in zip(*parts, strict=True)))


def _shifted(units: _Units, sparsity: float) -> np.ndarray:
    """The fractions, all moved by the same amount so that their mean over weights is the sparsity once they are within bounds."""
    least, total = min(LEAST, sparsity), units.size.sum()
    # Whole entries, and at least one of a row stays.
    most = (
        np.minimum(np.floor(max(MOST, sparsity) * units.columns), units.columns - 1) / units.columns
    )
    low, high = -1.0 - units.fraction.max(), 1.0 - units.fraction.min()
    for _ in range(60):  # halvings of an interval of length 3 or less: to the last bit of a float64
        middle = (low + high) / 2
        mean = np.sum(np.clip(units.fraction + middle, least, most) * units.size) / total
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return np.clip(units.fraction + high, least, most)


def exact(budget: Budget, shapes: Shapes, sparsity: float) -> Budget:
    """The budget that removes `sparsity` of all its weights to one unit, and in every linear or row a whole number of entries.

    Fractions are first moved, all by the same amount, and kept within LEAST and MOST; what whole entries leave over goes to those of
    largest remainder (Hare's quota). A unit is one entry of each row of a linear, or of one row where rows have their own fractions.
    """
    units = _units(budget, shapes)
    quota = _shifted(units, sparsity) * units.columns
    counts = np.floor(quota + 1e-9).astype(np.int64)
    left = round(sparsity * units.size.sum()) - np.sum(counts * units.weights)
    order = np.argsort(counts - quota, kind="stable")
    order = order[counts[order] + 1 < units.columns[order]]
    fill = order[np.cumsum(units.weights[order]) <= left]
    counts[fill] += 1
    found = iter(
        np.split(
            fraction_of(counts, units.columns),
            np.cumsum([np.size(f) for b in budget for f in b.values()])[:-1],
        )
    )
    return tuple(
        {slot: next(found).reshape(np.shape(f)) for slot, f in fractions.items()}
        for fractions in budget
    )


def block_means(budget: Budget, shapes: Shapes) -> list[float]:
    """What each block loses as a fraction of its prunable weights."""
    means = []
    for fractions, block in zip(budget, shapes, strict=True):
        size = [np.prod(block[slot]) for slot in fractions]
        means.append(float(np.average([np.mean(f) for f in fractions.values()], weights=size)))
    return means
