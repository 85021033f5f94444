"""Trials of mixes of levels: their divergence from the dense model on calibration windows."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from calibration.passes import micro_batches
from calibration.runtime import Runtime
from calibration.states import (
    Offload,
    States,
    available_memory,
    choose_offload,
    fits_in_memory,
)
from models.arch import Block, Model, apply_block, embed
from models.checkpoint.blocks import LazyBlocks, prefetch
from models.processes import is_multiprocess
from models.programs import Program
from models.sharding import STATES, place, split, to_host
from pruning.allocation.evopress_core import Unit, window_divergence

_divergence = Program(window_divergence, "divergence from the dense model", static=(0,))


def all_levels(units: Sequence[Unit]) -> range:
    """Return the levels from the lowest of any unit to the highest.

    Args:
      units: The units.
    """
    return range(min(u.low for u in units), max(u.high for u in units) + 1)


class MixTrials(abc.ABC):
    """Windows that mixes of levels are tried on, with the dense model's hidden states."""

    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        samples: int,
        runtime: Runtime,
        units: Sequence[Unit],
    ) -> None:
        """Keep what trials need; nothing is computed before the first of them.

        Args:
          model: The dense model.
          tokens: Calibration windows, int [samples length].
          samples: Windows that mixes are tried on, the first of them.
          runtime: How to execute.
          units: Units with a level each.
        """
        # What is computed here belongs to the search's steps, which are saved whole.
        self._runtime = dataclasses.replace(runtime, journal=None)
        self._model, self._tokens, self._units = model, tokens, units
        self._searched = tokens[:samples]
        self._of_block: list[list[int]] = [[] for _ in model.blocks]  # indices of a block's units
        for k, unit in enumerate(units):
            self._of_block[unit.block].append(k)

    @property
    def windows(self) -> int:
        """Return the number of windows that mixes are tried on."""
        return len(self._searched)

    @abc.abstractmethod
    def _mixed(self, i: int, block: Block, levels: Sequence[int]) -> Block:
        """Return a dense block with the parts of its units' levels.

        Args:
          i: Index of the block.
          block: The dense block.
          levels: Level of each unit of the model.
        """

    @functools.cached_property
    def _blocks(self) -> Sequence[Block]:
        """Return the dense blocks, on the devices where all of them fit."""
        blocks, mesh = self._model.blocks, self._runtime.mesh
        shards = mesh.shape["model"] if mesh else 1
        if isinstance(blocks, LazyBlocks) and not fits_in_memory(blocks.nbytes, shards):
            return blocks
        return list(prefetch(blocks, mesh=mesh))

    def _memory_for(self, weights: int) -> Offload:
        """Return the memory with room for this many weights."""
        if is_multiprocess():
            return "device"  # no process has a whole matrix
        dtype = jax.tree.leaves(self._model.non_block)[0].dtype
        size = weights * dtype.itemsize
        mesh = self._runtime.mesh
        shards = mesh.shape["model"] if mesh else 1
        return choose_offload(size // shards, size, available_memory())

    @functools.cached_property
    def _dense(self) -> np.ndarray:
        """Return the hidden states after the last dense block, on the host [windows t d]."""
        arch, mesh = self._model.arch, self._runtime.mesh
        non_block = place(self._model.non_block, mesh)
        xs = self._embedded(self._searched, non_block)
        for block in prefetch(self._blocks, mesh=mesh):
            for j, x in enumerate(xs):
                xs[j] = apply_block(arch, block, x, name="dense block")
        return np.concatenate([to_host(x) for x in xs])

    def _embedded(self, tokens: np.ndarray, non_block: Any) -> States:
        """Return the hidden states before the first block."""
        runtime, arch = self._runtime, self._model.arch
        batches = micro_batches(tokens, runtime.batch, runtime.mesh)
        xs = (embed(arch, non_block, t) for t in batches)
        return States(xs, runtime.offload, runtime.mesh)

    def divergences(self, mixes: Sequence[Sequence[int]], windows: Sequence[int]) -> list[float]:
        """Return the mean divergence of each mix from the dense model.

        Args:
          mixes: Level of each unit, for each mix.
          windows: Indices of the windows to try them on.
        """
        arch, runtime = self._model.arch, self._runtime
        non_block = place(self._model.non_block, runtime.mesh)
        first = self._embedded(self._searched[list(windows)], non_block)
        streams = [first.copy() for _ in mixes]
        for i, block in enumerate(prefetch(self._blocks, mesh=runtime.mesh)):
            for levels, xs in zip(mixes, streams, strict=True):
                mixed = self._mixed(i, block, levels)
                for j, x in enumerate(xs):
                    xs[j] = apply_block(arch, mixed, x, name="trial block")
        dense = self._dense[list(windows)]
        means = []
        for xs in streams:
            values = []
            for j, x in enumerate(xs):
                own = dense[j * runtime.batch : (j + 1) * runtime.batch]
                target = split(own, runtime.mesh, STATES)
                values.append(to_host(_divergence(arch.head, non_block, target, x)))
            mean = float(np.mean(np.concatenate(values)))
            means.append(mean if np.isfinite(mean) else np.inf)  # NaN would be the least
        return means
