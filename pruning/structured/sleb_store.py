"""Hidden states kept between trials, in the fastest memory with room for them."""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from calibration.states import OFFLOADS, Kept, OnDisk, fetch, keep
from pruning.structured.sleb_paths import Path, Piece


class StoreLimits(NamedTuple):
    """Limits of a store.

    Attributes:
      every: Number of pieces from one kept state to the next; 0: none is kept.
      bytes: Bytes by kind of memory, in the order of OFFLOADS.
    """

    every: int
    bytes: tuple[int, ...]


def _fill(need: int, available: Sequence[int]) -> tuple[int, ...]:
    """Return the bytes taken of each kind of memory for `need` bytes, the fastest first."""
    taken = []
    for room in available:
        taken.append(min(need, room))
        need -= taken[-1]
    return tuple(taken)


def plan_stores(
    depth: int, state_bytes: int, available: Sequence[int]
) -> tuple[StoreLimits, StoreLimits]:
    """Divide the memory between the states that candidates share and their own.

    Shared states come first, as every candidate starts from them. States that do not all fit are
    spread evenly over the blocks: the missing ones are run again from the last one kept.

    Args:
      depth: Number of blocks.
      state_bytes: Bytes of the hidden states of all windows between two blocks.
      available: Bytes by kind of memory, in the order of OFFLOADS.

    Returns:
      Limits of the states that the surviving blocks leave, and of those that candidates leave.
    """
    total = sum(available)
    shared_need = (depth - 1) * state_bytes
    # A candidate goes its own way from the block that it leaves out: the earlier, the longer.
    own_need = depth * (depth - 1) // 2 * state_bytes
    shared_bytes = _fill(shared_need, available)
    shared_every = math.ceil(shared_need / total) if total else 0
    # At least one state halfway, as long as anything fits at all.
    shared = StoreLimits(min(shared_every, max(1, depth // 2)), shared_bytes)
    own_bytes = (0,) * len(available)
    if total > shared_need:
        own_bytes = tuple(room - used for room, used in zip(available, shared_bytes, strict=True))
    own_every = math.ceil(own_need / sum(own_bytes)) if sum(own_bytes) else 0
    return shared, StoreLimits(own_every, own_bytes)


class _Entry(NamedTuple):
    """States in a store, with the index of their kind of memory and their bytes."""

    states: Kept
    memory: int
    nbytes: int


class Store:
    """Hidden states [b t d] by micro-batch and path.

    Args:
      limits: Distance of states, and bytes by kind of memory.
      directory: Place of the files.
    """

    def __init__(self, limits: StoreLimits, directory: pathlib.Path) -> None:
        self.limits = limits
        self.most = [0] * len(OFFLOADS)  # largest number of bytes so far, by kind of memory
        self._directory = directory
        self._file_numbers = itertools.count()
        self._entries: dict[tuple[int, Path], _Entry] = {}
        self._used = [0] * len(OFFLOADS)

    def get(self, m: int, path: Path) -> jax.Array | np.ndarray | None:
        """Return the states that a path leaves of micro-batch `m`, or None if they are not kept.

        Args:
          m: Index of the micro-batch.
          path: Pieces that the states have been through.
        """
        entry = self._entries.get((m, path))
        return fetch(entry.states) if entry else None

    def put(self, m: int, path: Path, x: jax.Array) -> None:
        """Keep the states if the limits ask for them and memory is left.

        Args:
          m: Index of the micro-batch.
          path: Pieces that the states have been through.
          x: The states [b t d].
        """
        every = self.limits.every
        if not every or len(path) % every or (m, path) in self._entries:
            return
        for memory, limit in enumerate(self.limits.bytes):
            # The first memory with room is the fastest one: OFFLOADS stand in that order.
            if self._used[memory] + x.nbytes <= limit:
                # Two stores share the directory, hence the identity in the name.
                file = self._directory / f"{id(self)}-{next(self._file_numbers)}.npy"
                states = keep(x, OFFLOADS[memory], file)
                self._entries[m, path] = _Entry(states, memory, x.nbytes)
                self._used[memory] += x.nbytes
                self.most[memory] = max(self.most[memory], self._used[memory])
                return

    def forget(self, piece: Piece) -> None:
        """Drop the states that have been through a removed piece.

        Args:
          piece: No path holds it any more.
        """
        for key in [key for key in self._entries if piece in key[1]]:
            entry = self._entries.pop(key)
            self._used[entry.memory] -= entry.nbytes
            # Arrays go with their last reference, files do not.
            if isinstance(entry.states, OnDisk):
                entry.states.path.unlink()
