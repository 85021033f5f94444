"""What is left of a model whose blocks were removed, and the cuts where something is missing."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from models.arch import Block, Model
from pruning.structured.sleb_paths import Path, Piece
from pruning.structured.sleb_runner import silenced


class Remains(NamedTuple):
    """A model whose blocks were removed.

    Attributes:
      model: The dense model.
      path: Pieces that stay.
      writers: All linears of a block that write to the residual stream, in order.
      silent: Linears to zero, by piece.
    """

    model: Model
    path: Path
    writers: tuple[str, ...]
    silent: Mapping[Piece, Sequence[str]]

    def finished(self, index: int, block: Block) -> Block:
        """Return the block of a piece without its silent linears.

        Args:
          index: Number of the piece.
          block: The dense block.
        """
        return silenced(block, self.silent[self.path[index]])


class Cut(NamedTuple):
    """A place in the pruned model behind which something is missing.

    Attributes:
      piece: Number of the piece before it; -1 at the start of the model.
      end: Dense block whose input the stream should equal behind the cut; behind the last block,
        the number of blocks.
      linear: Last linear that writes to the stream before the cut; empty at the start.
    """

    piece: int
    end: int
    linear: str


def cuts_of(remains: Remains) -> list[Cut]:
    """Return the cuts of a model, in order.

    Args:
      remains: What stays of the model.
    """
    path, depth = remains.path, len(remains.model.blocks)
    ends = [*(piece.block for piece in path[1:]), depth]
    cuts = [Cut(-1, path[0].block, "")] if path[0].block else []
    for k, (piece, end) in enumerate(zip(path, ends, strict=True)):
        if piece.silent or end > piece.block + 1:
            # Behind its last writer nothing of a block reads the stream any more, so the output is
            # linear in this one.
            linear = [w for w in remains.writers if w not in piece.silent][-1]
            cuts.append(Cut(k, end, linear))
    return cuts
