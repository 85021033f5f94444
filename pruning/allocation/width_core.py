"""Levels of widths: units that move between blocks while the number of removed weights stays.

At level 0 a block keeps as many heads and neurons as the method chose. Each level more takes as
many units of its kind in every block, so that a switch of two levels changes no budget.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pruning.allocation.evopress_core import Unit


class Size(NamedTuple):
    """Units of one kind in a block.

    Attributes:
      units: Units of the dense block.
      kept: Units that level 0 keeps.
      cost: Parameters that one unit holds.
    """

    units: int
    kept: int
    cost: float


def width_units(
    sizes: Sequence[Mapping[str, Size]], step: float, levels: int, multiple: int = 0
) -> list[Unit]:
    """Return the parts of blocks whose width has a level each.

    Args:
      sizes: By block: kind of unit -> its size.
      step: Share of a mean block's units between one level and the next; one unit at least.
      levels: Most levels up or down.
      multiple: Neurons between two levels are a multiple of this many; 0: any number.
    """
    means = {
        kind: float(np.mean([block[kind].units for block in sizes if kind in block]))
        for block in sizes
        for kind in block
    }
    units = []
    for i, block in enumerate(sizes):
        for kind, size in block.items():
            # Heads are few, and their width suits the hardware already.
            own = max(1, multiple) if kind == "neurons" else 1
            n = own * max(1, round(step * means[kind] / own))
            # One unit stays: no format stores empty matrices.
            more = min(levels, max(0, size.kept - 1) // n)
            fewer = min(levels, (size.units - size.kept) // n)
            units.append(Unit(i, {kind: n}, round(n * size.cost), -fewer, more))
    return units


def moved(unit: Unit, level: int) -> dict[str, int]:
    """Return how many units a part keeps more than at level 0, by kind.

    Args:
      unit: The part.
      level: Its level.
    """
    return {kind: -level * n for kind, n in unit.steps.items()}


def moves(units: Sequence[Unit], levels: Sequence[int], blocks: int) -> list[dict[str, int]]:
    """Return how many units each block keeps more than at level 0, by block and kind.

    Args:
      units: The parts that have a level.
      levels: Level of each.
      blocks: Number of blocks.
    """
    found: list[dict[str, int]] = [{} for _ in range(blocks)]
    for unit, level in zip(units, levels, strict=True):
        found[unit.block] |= moved(unit, level)
    return found
