"""Blocks of many widths, read with zeros in a few: a program is compiled for every shape."""

from typing import Any

import jax
from jax.sharding import Mesh

from models.arch import Arch, Block, Group, Model
from models.checkpoint.blocks import LazyBlocks
from models.surgery import units, widen

WIDTHS = 8  # most widths of a kind of units


def rounded_count(count: int, most: int) -> int:
    """Return the least of `WIDTHS` numbers of units that is not below a number.

    Args:
      count: Number of units.
      most: Number of units of the widest block.
    """
    step = -(-most // WIDTHS)
    return min(most, step * max(1, -(-count // step)))


def _counts(arch: Arch, block: Block) -> dict[Group, int]:
    """Return the number of units of each group of a block or of its specs."""
    groups = (group for kind in ("heads", "neurons") for group in arch.groups_of(block, kind))
    return {group: units(block, group) for group in groups}


class FewWidths(LazyBlocks):
    """Blocks of a checkpoint that are read with zero units, so that they have few shapes.

    Args:
      blocks: The blocks.
      arch: Their architecture.
    """

    def __init__(self, blocks: LazyBlocks, arch: Arch) -> None:
        super().__init__(blocks._tensors, blocks.specs, blocks._dtype)
        self._own = [_counts(arch, spec) for spec in blocks.specs]
        most: dict[Group, int] = {}
        for counts in self._own:
            most |= {group: max(n, most.get(group, 0)) for group, n in counts.items()}
        self._counts = [
            {group: rounded_count(n, most[group]) for group, n in counts.items()}
            for counts in self._own
        ]

    @property
    def shapes(self) -> tuple[int, int]:
        """Return the number of different shapes of blocks, as they are and with zeros."""
        own, rounded = ({tuple(c.values()) for c in counts} for counts in (self._own, self._counts))
        return len(own), len(rounded)

    def fetch(self, i: int, mesh: Mesh | None = None) -> Block:
        """Read a block into host memory and add zero units, as `LazyBlocks.fetch` says."""
        block: Any = super().fetch(i, mesh)
        for group, count in self._counts[i].items():
            block = widen(block, group, count - self._own[i][group])
        return block


def with_few_widths(model: Model) -> Model:
    """Return a model that computes the same in few programs, if its blocks have many shapes.

    Args:
      model: Model of a checkpoint.
    """
    # Each of several processes reads the rows that its devices hold, which zeros would move.
    if not isinstance(model.blocks, LazyBlocks) or jax.process_count() > 1:
        return model
    blocks = FewWidths(model.blocks, model.arch)
    own, rounded = blocks.shapes
    return model._replace(blocks=blocks) if own > max(WIDTHS, rounded) else model
