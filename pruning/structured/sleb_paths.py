"""Sequences of blocks with parts left out, as values.

Hidden states are identified by the path they took. Two models that begin alike then share states: a
candidate with the model it is removed from, and with itself one removal earlier.
"""

from typing import NamedTuple


class Piece(NamedTuple):
    """A block of a path.

    Attributes:
      block: Index in the dense model.
      silent: Its linears that no longer write to the residual stream.
    """

    block: int
    silent: tuple[str, ...] = ()


Path = tuple[Piece, ...]


class Unit(NamedTuple):
    """The smallest part of a model that is removed at a time.

    Attributes:
      block: Index of the block.
      writers: Its linears whose output to the residual stream is removed.
    """

    block: int
    writers: tuple[str, ...]


class Candidate(NamedTuple):
    """A model without one more unit.

    Attributes:
      path: The pieces that stay.
      shared: Number of pieces at the start that it shares with the model it is removed from.
    """

    path: Path
    shared: int


def whole_path(blocks: int) -> Path:
    """Return the path of a model with nothing removed.

    Args:
      blocks: Number of blocks.
    """
    return tuple(Piece(i) for i in range(blocks))


def remove_unit(path: Path, unit: Unit, writers: tuple[str, ...]) -> Candidate:
    """Return the path without a unit.

    A block of which no writer is left is dropped: it would be the identity.

    Args:
      path: Holds the unit's block.
      unit: Unit to remove.
      writers: All linears of a block that write to the residual stream.
    """
    at = next(k for k, piece in enumerate(path) if piece.block == unit.block)
    # In the order of `writers`: equal pieces must be equal keys, whatever was removed first.
    silent = tuple(w for w in writers if w in path[at].silent or w in unit.writers)
    # A block without writers is not run, and its states are those of the piece before.
    rest: Path = () if silent == writers else (Piece(unit.block, silent),)
    return Candidate(path[:at] + rest + path[at + 1 :], at)
