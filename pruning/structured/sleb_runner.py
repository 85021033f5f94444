"""Running a model with parts left out, over and over, without running any block twice on what is still at hand.

A *path* is the sequence of blocks that hidden states have been through. States are kept by their path, so that two models that begin
alike share what they have in common: a candidate for removal with the model it is removed from, and with itself one removal earlier.
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.journal import digest
from calibration.passes import micro_batches
from calibration.runtime import Runtime
from calibration.states import (
    OFFLOADS,
    Kept,
    OnDisk,
    States,
    fetch,
    fits_in_memory,
    keep,
    scratch,
)
from models.arch import Arch, Block, Model, apply_block, embed
from models.checkpoint.blocks import LazyBlocks, prefetch
from models.processes import is_multiprocess
from models.programs import Program, program
from models.sharding import place, split, to_host
from pruning.structured.sleb_core import PARTS, add_part, chosen_logits, influence

Piece = tuple[
    int, tuple[str, ...]
]  # a block, and those of its linears that write nothing to the residual stream any more
Path = tuple[Piece, ...]


class Unit(NamedTuple):
    """What is removed at a time: all that these linears of a block write to the residual stream."""

    block: int
    writers: tuple[str, ...]


class Candidate(NamedTuple):
    """The model without one more unit: its path, and how many pieces at its start it shares with the model it is removed from."""

    path: Path
    shared: int


def without(path: Path, unit: Unit, writers: tuple[str, ...]) -> Candidate:
    """The path without a unit. A piece that none of the architecture's `writers` is left of is gone: a removed block is the identity."""
    k = next(k for k, (block, _) in enumerate(path) if block == unit.block)
    silent = tuple(w for w in writers if w in path[k][1] or w in unit.writers)
    rest: Path = () if silent == writers else ((unit.block, silent),)
    return Candidate(path[:k] + rest + path[k + 1 :], k)


class Room(NamedTuple):
    """What a store may hold: states after every so many pieces (0: none), and bytes by tier."""

    every: int
    bytes: tuple[int, ...]


def _taken(need: int, there: Sequence[int]) -> tuple[int, ...]:
    """What of each tier is used for so many bytes, the fastest first."""
    found = []
    for room in there:
        found.append(min(need, room))
        need -= found[-1]
    return tuple(found)


def plan_stores(depth: int, state: int, there: Sequence[int]) -> tuple[Room, Room]:
    """How the bytes are spent: first on the states that the surviving blocks leave, then on those that candidates leave.

    Args:
      depth: blocks; state: bytes of the hidden states of all windows between two blocks; there: bytes by tier.
    Returns the room of the states that all candidates share, and that of each candidate's own. States that do not all fit are spread
    evenly over the blocks: what is missing is run again from the last one kept.
    """
    shared, own = (depth - 1) * state, depth * (depth - 1) // 2 * state
    every = math.ceil(shared / sum(there)) if sum(there) else 0
    taken = _taken(shared, there)
    left = (
        tuple(room - used for room, used in zip(there, taken, strict=True))
        if sum(there) > shared
        else (0,) * len(there)
    )
    return Room(min(every, max(1, depth // 2)), taken), Room(
        math.ceil(own / sum(left)) if sum(left) else 0, left
    )


class _Held(NamedTuple):
    """States in a store, with the index of their kind of memory and their bytes."""

    kept: Kept
    tier: int
    nbytes: int


class Store:
    """Hidden states [b t d] by (micro-batch, path), in the fastest memory with room for them.

    Args:
      room: States to keep, and bytes by kind of memory.
      directory: Place of the files.
    """

    def __init__(self, room: Room, directory: pathlib.Path) -> None:
        self.room, self._directory, self._files = room, directory, itertools.count()
        self._held: dict[tuple[int, Path], _Held] = {}
        self._used = [0] * len(OFFLOADS)
        self.most = [0] * len(OFFLOADS)  # largest number of bytes so far

    def get(self, m: int, path: Path) -> jax.Array | np.ndarray | None:
        """Return the states that a path leaves of micro-batch `m`, or None if they are not kept."""
        held = self._held.get((m, path))
        return fetch(held.kept) if held else None

    def put(self, m: int, path: Path, x: jax.Array) -> None:
        """Keep the states if the plan asks for them and there is room."""
        if not self.room.every or len(path) % self.room.every or (m, path) in self._held:
            return
        for tier, limit in enumerate(self.room.bytes):
            if self._used[tier] + x.nbytes <= limit:
                file = self._directory / f"{id(self)}-{next(self._files)}.npy"
                kept = keep(x, OFFLOADS[tier], file)
                self._held[m, path] = _Held(kept, tier, x.nbytes)
                self._used[tier] += x.nbytes
                self.most[tier] = max(self.most[tier], self._used[tier])
                return

    def forget(self, piece: Piece) -> None:
        """Drop the states that have been through a removed piece."""
        for key in [k for k in self._held if piece in k[1]]:
            held = self._held.pop(key)
            self._used[held.tier] -= held.nbytes
            if isinstance(held.kept, OnDisk):
                held.kept.path.unlink()


_chosen_logits = Program(chosen_logits, "logits of the next tokens", static=(0,))
_add_part = Program(add_part, "part of a candidate's loss", static=(0,))
_influence = Program(influence, "influence of a block")


@program("linears silenced")
def _zeros_like(linears: Any) -> Any:
    """Return zeros of the same shapes."""
    return jax.tree.map(jnp.zeros_like, linears)


def silenced(block: Block, writers: Iterable[str]) -> Block:
    """The block with these linears zero, biases too: of equal shapes, so what is compiled for one block runs it."""
    return block.replace(**{w: _zeros_like(getattr(block, w)) for w in writers})


class Runner:
    """A model's blocks with the tokens they are tried on; runs any path from the longest part of it that is kept.

    `held`: the blocks stay on the devices; those of a checkpoint too large for that are read each time they are run, the next one of the
    path while one is at work. `evaluations` counts what was run, in blocks times windows; `sizes` has the windows of each micro-batch;
    `steps` how many bounds a loss has; `stores` the states that all candidates of a phase share, and those that are each candidate's own;
    `digest` tells the tokens.
    """

    def __init__(
        self, model: Model, tokens: np.ndarray, runtime: Runtime, room: Sequence[int]
    ) -> None:
        self.arch: Arch = model.arch
        self.digest = digest(tokens)
        self._offload, self._mesh = runtime.offload, runtime.mesh
        self._non_block = place(model.non_block, self._mesh)
        blocks = model.blocks
        shards = self._mesh.shape["model"] if self._mesh else 1
        self.held = not isinstance(blocks, LazyBlocks) or fits_in_memory(blocks.nbytes, shards)
        self._blocks = list(prefetch(blocks, mesh=self._mesh)) if self.held else blocks
        self._tokens = list(micro_batches(tokens, runtime.batch, self._mesh))
        shape = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        x = jax.eval_shape(model.arch.embed, model.non_block, shape)
        # States that lie over several processes stay on their devices.
        usable = (room[0], 0, 0) if is_multiprocess() else tuple(room)
        shared, own = plan_stores(len(blocks), x.size * x.dtype.itemsize, usable)
        directory = scratch(self)
        self.stores = Store(shared, directory), Store(own, directory)
        self.depth = len(blocks)
        self.sizes = [len(t) for t in self._tokens]
        self.evaluations = 0
        self.steps = PARTS * len(self._tokens)

    def _along(self, path: Path) -> Iterator[Block]:
        """The blocks of the path's pieces."""
        return prefetch(self._blocks, [i for i, _ in path], self._mesh)

    def _apply(self, piece: Piece, block: Block, x: jax.Array) -> jax.Array:
        self.evaluations += x.shape[0]
        y = apply_block(self.arch, silenced(block, piece[1]), x)
        return (
            y if self.held else jax.block_until_ready(y)
        )  # else blocks that wait to be run would gather

    def _start(self, m: int, path: Path) -> tuple[int, jax.Array]:
        """The longest part of the path whose states are kept, and these."""
        for k in range(len(path), 0, -1):
            for store in self.stores:
                if (x := store.get(m, path[:k])) is not None:
                    return k, split(x, self._mesh, "sample")
        return 0, embed(self.arch, self._non_block, self._tokens[m])

    def run(self, m: int, candidate: Candidate) -> jax.Array:
        """What the path makes of micro-batch `m`: [b t d]."""
        path, shared = candidate
        start, x = self._start(m, path)
        for k, block in enumerate(self._along(path[start:]), start):
            x = self._apply(path[k], block, x)
            if k + 1 < len(path):
                self.stores[k >= shared].put(m, path[: k + 1], x)
        return x

    def bounds(self, candidate: Candidate) -> Iterator[float]:
        """The candidate's loss as the released code sums it, the mean cross-entropy of each window times its length, from below: after
        every part of every micro-batch's vocabulary, the first part of all of them first. The last of `steps` is the loss."""
        xs, picked, sums, found = (
            States([], self._offload, self._mesh),
            [],
            [],
            np.zeros(len(self.sizes)),
        )
        for part in range(PARTS):
            for m, tokens in enumerate(self._tokens):
                if part == 0:
                    xs.append(self.run(m, candidate))
                    logits = _chosen_logits(self.arch.head, self._non_block, xs[m], tokens)
                    picked.append(logits)
                    sums.append(picked[m])
                sums[m], bound = _add_part(
                    self.arch.head,
                    self._non_block,
                    xs[m],
                    tokens,
                    picked[m],
                    sums[m],
                    np.int32(part),
                )
                found[m] = to_host(bound).astype(np.float64).sum() * tokens.shape[1]
                yield float(found.sum())

    def influences(
        self, m: int, path: Path, units: Mapping[int, Unit], writers: tuple[str, ...]
    ) -> dict[int, float]:
        """The influence of each unit on what leaves its block, in micro-batch `m`; one walk along the path to the last of them."""
        found, x = {}, embed(self.arch, self._non_block, self._tokens[m])
        last = max(unit.block for unit in units.values())
        path = path[: 1 + [i for i, _ in path].index(last)]
        for k, block in enumerate(self._along(path)):
            y = self._apply(path[k], block, x)
            self.stores[0].put(m, path[: k + 1], y)
            for u in [u for u, unit in units.items() if unit.block == path[k][0]]:
                left, _ = without((path[k],), units[u], writers)
                found[u] = _influence(self._apply(left[0], block, x) if left else x, y)
            x = y
        return {u: float(f) for u, f in found.items()}

    def forget(self, piece: Piece) -> None:
        """Drop the states that a removed piece went into."""
        for store in self.stores:
            store.forget(piece)


class Trial(NamedTuple):
    """One candidate's loss, summed over windows; None if it was stopped or is not finite. `passed`: the loss it was stopped for
    exceeding. `guess`: the whole loss, going by the part of it that is known."""

    loss: float | None
    passed: float | None
    guess: float


def try_one(
    runner: Runner, candidate: Candidate, limit: float, typical: Sequence[float]
) -> tuple[Trial, list[float]]:
    """The loss of a candidate, or that it exceeds `limit`, from its bounds; and these.

    Args:
      typical: all bounds of another candidate, from which the whole is guessed; empty if this one will not be stopped.
    """
    bounds: list[float] = []
    for bound in runner.bounds(candidate):
        bounds.append(bound)
        if not math.isfinite(bound):
            return Trial(None, None, math.inf), bounds
        if bound > limit and len(bounds) < runner.steps:
            return Trial(None, limit, bound * typical[-1] / typical[len(bounds) - 1]), bounds
    return Trial(bounds[-1], None, bounds[-1]), bounds


def try_all(
    runner: Runner,
    candidates: Mapping[int, Candidate],
    best: int,
    stop: bool,
    advance: Callable[[], None],
) -> dict[int, Trial]:
    """One phase: every candidate's trial, in the order they come in.

    Args:
      best: how many of the lowest losses must be known; `stop`: whether candidates that cannot be among them are stopped.
      advance: called after every candidate.
    """
    trials: dict[int, Trial] = {}
    typical: list[float] = []
    for unit, candidate in candidates.items():
        full = sorted(t.loss for t in trials.values() if t.loss is not None)
        bound = full[best - 1] if stop and len(full) >= best else math.inf
        trials[unit], bounds = try_one(runner, candidate, bound, typical)
        typical = typical or (bounds if trials[unit].loss is not None else [])
        advance()
    return trials
