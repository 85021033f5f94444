"""Run a model with parts left out, from the longest part of its path whose states are kept."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibration.digests import digest
from calibration.passes import micro_batches
from calibration.runtime import Runtime
from calibration.states import States, fits_in_memory, scratch
from models.arch import (
    Arch,
    Block,
    Model,
    apply_block,
    embed,
    has_linear,
    linear_of,
    with_linears,
)
from models.checkpoint.blocks import ReadBlocks, prefetch
from models.processes import is_multiprocess
from models.programs import Program, program
from models.sharding import STATES, place, split, to_host
from pruning.allocation.evopress_core import window_divergence
from pruning.structured.sleb_core import PARTS, add_part, chosen_logits, influence
from pruning.structured.sleb_paths import Candidate, Path, Piece, Unit, remove_unit, whole_path
from pruning.structured.sleb_store import Store, plan_stores

_chosen_logits = Program(chosen_logits, "logits of the next tokens", static=(0,))
_add_part = Program(add_part, "part of a candidate's loss", static=(0,))
_divergence = Program(window_divergence, "divergence from the dense model", static=(0,))
_influence = Program(influence, "influence of a block")


@program("linears silenced")
def _zeros_like(linears: Any) -> Any:
    """Return zeros of the same shapes."""
    return jax.tree.map(jnp.zeros_like, linears)


def silenced(block: Block, names: Iterable[str]) -> Block:
    """Return the block with these linears zero, biases too.

    Shapes stay, so that the program compiled for a whole block runs this one.

    Args:
      block: Parameters.
      names: Linears to zero.
    """
    here = [name for name in names if has_linear(block, name)]
    return with_linears(block, {name: _zeros_like(linear_of(block, name)) for name in here})


class Runner:
    """A model's blocks with the calibration tokens that removals are tried on.

    Attributes:
      arch: Architecture.
      digest: Digest of the tokens, for keys of durable steps.
      depth: Number of blocks.
      windows: Windows of each micro-batch.
      bounds_per_loss: Number of bounds that lead to a loss.
      blocks_held: Whether all blocks stay on the devices; else each is read whenever it is run, and
        the next of the path while one is at work.
      shared: States that all candidates of a phase share.
      own: States of each candidate alone.
      evaluations: Blocks times windows run so far.
    """

    def __init__(
        self, model: Model, tokens: np.ndarray, runtime: Runtime, room: Sequence[int]
    ) -> None:
        """Read or place the blocks and divide the memory for states.

        Args:
          model: The dense model.
          tokens: Calibration windows, int [samples length].
          runtime: How to execute.
          room: Bytes for states by kind of memory, in the order of OFFLOADS.
        """
        self.arch: Arch = model.arch
        self.digest = digest(tokens)
        self._offload = runtime.offload
        self._mesh = runtime.mesh
        self._non_block = place(model.non_block, self._mesh)
        blocks = model.blocks
        shards = self._mesh.shape["model"] if self._mesh else 1
        streamed = isinstance(blocks, ReadBlocks) and not fits_in_memory(blocks.nbytes, shards)
        self.blocks_held = not streamed
        # Trials run every block again and again: those that fit are placed once.
        self._blocks = list(prefetch(blocks, mesh=self._mesh)) if self.blocks_held else blocks
        self._tokens = list(micro_batches(tokens, runtime.batch, self._mesh))
        shape = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        x = jax.eval_shape(model.arch.embed, model.non_block, shape)
        # States that lie over several processes stay on their devices: none has them whole.
        usable = (room[0], 0, 0) if is_multiprocess() else tuple(room)
        shared, own = plan_stores(len(blocks), x.size * x.dtype.itemsize, usable)
        directory = scratch(self)
        self.shared = Store(shared, directory)
        self.own = Store(own, directory)
        self.depth = len(blocks)
        self.windows = [len(t) for t in self._tokens]
        self.evaluations = 0
        self.bounds_per_loss = PARTS * len(self._tokens)

    def _read(self, path: Path) -> Iterator[Block]:
        """Yield the blocks of the path's pieces."""
        return prefetch(self._blocks, [piece.block for piece in path], self._mesh)

    def _embed(self, m: int) -> jax.Array:
        """Return the states of a micro-batch before the first block, [b t d]."""
        return split(embed(self.arch, self._non_block, self._tokens[m]), self._mesh, STATES)

    def _apply(self, piece: Piece, block: Block, x: jax.Array) -> jax.Array:
        """Return the output of a piece [b t d]."""
        self.evaluations += x.shape[0]
        y = apply_block(self.arch, silenced(block, piece.silent), x)
        y = split(y, self._mesh, STATES)
        # Blocks that are read one by one would gather in memory while they wait to be run.
        return y if self.blocks_held else jax.block_until_ready(y)

    def _start(self, m: int, path: Path) -> tuple[int, jax.Array]:
        """Return the length of the longest part of the path whose states are kept, and these."""
        for k in range(len(path), 0, -1):
            for store in (self.shared, self.own):
                x = store.get(m, path[:k])
                if x is not None:
                    # States from the host or disk go back to the devices.
                    return k, split(x, self._mesh, STATES)
        return 0, self._embed(m)

    def run(self, m: int, candidate: Candidate) -> jax.Array:
        """Return the last block's output of a candidate for one micro-batch [b t d].

        Args:
          m: Index of the micro-batch.
          candidate: The path to run.
        """
        path, shared = candidate
        start, x = self._start(m, path)
        for k, block in enumerate(self._read(path[start:]), start):
            x = self._apply(path[k], block, x)
            if k + 1 < len(path):  # nobody goes on from the last block's output
                store = self.own if k >= shared else self.shared
                store.put(m, path[: k + 1], x)
        return x

    def loss_bounds(self, candidate: Candidate) -> Iterator[float]:
        """Yield lower bounds of a candidate's loss; the last of `bounds_per_loss` is the loss.

        The loss is summed as in the official code: the mean cross-entropy of each window times its
        length. A bound follows every part of the vocabulary of every micro-batch, the first part of
        all micro-batches first.

        Args:
          candidate: The path to run.
        """
        # Outputs stay until all parts are done: running the blocks again would cost far more.
        xs = States([], self._offload, self._mesh)
        chosen: list[jax.Array] = []
        sums: list[jax.Array] = []
        losses = np.zeros(len(self.windows))
        for part in range(PARTS):
            for m, tokens in enumerate(self._tokens):
                if part == 0:
                    xs.append(self.run(m, candidate))
                    logits = _chosen_logits(self.arch.head, self._non_block, xs[m], tokens)
                    chosen.append(logits)
                    sums.append(logits)
                sums[m], bound = _add_part(
                    self.arch.head,
                    self._non_block,
                    xs[m],
                    tokens,
                    chosen[m],
                    sums[m],
                    np.int32(part),  # data, so that one program serves all parts
                )
                # Summed in float64, so that candidates close to each other keep their order.
                losses[m] = to_host(bound).astype(np.float64).sum() * tokens.shape[1]
                yield float(losses.sum())

    def divergences(self, m: int, candidate: Candidate, dense: jax.Array) -> np.ndarray:
        """Return the divergence of each window's predictions from the dense model's, float32 [b].

        Args:
          m: Index of the micro-batch.
          candidate: The path to run.
          dense: What the whole path gives for the micro-batch, [b t d].
        """
        x = self.run(m, candidate)
        return to_host(_divergence(self.arch.head, self._non_block, dense, x))

    def whole(self) -> States:
        """Return the last block's outputs of the dense model, by micro-batch."""
        path = whole_path(self.depth)
        xs = (self.run(m, Candidate(path, self.depth)) for m in range(len(self.windows)))
        return States(xs, self._offload, self._mesh)

    def influences(
        self, m: int, path: Path, units: Mapping[int, Unit], writers: tuple[str, ...]
    ) -> dict[int, float]:
        """Return the influence of each unit on its block's output, for one micro-batch.

        Args:
          m: Index of the micro-batch.
          path: Pieces that stay; blocks after the last unit are not run.
          units: Units by index.
          writers: All linears of a block that write to the residual stream.
        """
        influences: dict[int, jax.Array] = {}
        x = self._embed(m)
        last = max(unit.block for unit in units.values())
        path = path[: 1 + [piece.block for piece in path].index(last)]
        for k, block in enumerate(self._read(path)):
            y = self._apply(path[k], block, x)
            # The first phase of trials starts from these states.
            self.shared.put(m, path[: k + 1], y)
            for u in [u for u, unit in units.items() if unit.block == path[k].block]:
                left, _ = remove_unit((path[k],), units[u], writers)
                without = self._apply(left[0], block, x) if left else x
                influences[u] = _influence(without, y)
            x = y
        # Read only now: waiting for each number would hold up the next block.
        return {u: float(to_host(value)) for u, value in influences.items()}

    def cosines(self, m: int, most: int) -> dict[tuple[int, int], float]:
        """Return the mean cosines of the inputs of two blocks, for one micro-batch.

        Args:
          m: Index of the micro-batch.
          most: Most blocks from the first to the second.
        """
        inputs = [self._embed(m)]
        distances: dict[tuple[int, int], jax.Array] = {}
        path = whole_path(self.depth)[:-1]
        for j, block in enumerate(self._read(path), 1):
            inputs.append(self._apply(path[j - 1], block, inputs[-1]))
            for i in range(max(0, j - most), j):
                distances[i, j] = _influence(inputs[i], inputs[j])
        # Read only now: waiting for each number would hold up the next block.
        return {pair: 1 - float(to_host(value)) for pair, value in distances.items()}

    def forget(self, piece: Piece) -> None:
        """Drop the states that have been through a removed piece.

        Args:
          piece: No path holds it any more.
        """
        for store in (self.shared, self.own):
            store.forget(piece)
