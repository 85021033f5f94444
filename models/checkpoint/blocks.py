"""Sequences of blocks that are read on demand, and reading ahead while the caller works."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.arch import Block
from models.checkpoint.tensors import WHOLE, Tensors
from models.errors import InputError
from models.families import hf
from models.sharding import own_rows, place


class ReadBlocks(Sequence[Block]):
    """Blocks that are read when they are indexed; subclasses give the length and `read`."""

    def read(self, i: int) -> Block:
        """Read a block.

        Args:
          i: Index of the block, 0 <= i < len(self).

        Returns:
          Parameters of the block.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Return the bytes that all blocks together take in memory at most."""
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> Block: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, i: int | slice) -> Block | tuple[Block, ...]:
        # A range resolves slices and negative indices, and raises IndexError.
        indices = range(len(self))
        if isinstance(i, slice):
            return tuple(self.read(j) for j in indices[i])
        return self.read(indices[i])


class LazyBlocks(ReadBlocks):
    """Blocks of a checkpoint, each read and checked for non-finite numbers on demand, none kept.

    Args:
      tensors: Tensors of the checkpoint.
      specs: Specs of each block.
      dtype: Type of the parameters in memory.
    """

    def __init__(self, tensors: Tensors, specs: Sequence[Block], dtype: jnp.dtype):
        self.specs = specs
        self._tensors = tensors
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def nbytes(self) -> int:
        """Return the bytes that all blocks together would take in memory."""
        numbers = sum(math.prod(s.shape) for s in jax.tree.leaves(self.specs, is_leaf=hf.is_spec))
        return numbers * jnp.dtype(self._dtype).itemsize

    def read(self, i: int) -> Block:
        """Read a block onto the default device, in the requested dtype.

        Args:
          i: Index of the block.

        Returns:
          Parameters of the block.
        """
        return self.placed(self.fetch(i))

    def __iter__(self) -> Iterator[Block]:
        return prefetch(self)

    def fetch(self, i: int, mesh: Mesh | None = None) -> Block:
        """Read a block into host memory, in its stored dtype.

        Args:
          i: Index of the block.
          mesh: Mesh of several processes; rows that it gives to other processes alone are not read
            and are zero. None reads all rows.

        Returns:
          Block of NumPy arrays.
        """
        return fetch(self._tensors, self.specs[i], mesh)

    def placed(self, block: Block, mesh: Mesh | None = None) -> Block:
        """Put a fetched block on the devices, in the requested dtype.

        Args:
          block: Block of NumPy arrays.
          mesh: Mesh; None for the default device.

        Returns:
          Parameters of the block.
        """
        return put_on_devices(block, self._dtype, mesh)


class ChangedBlocks(ReadBlocks):
    """Blocks of a model, each changed when it is read, none kept.

    Args:
      blocks: Blocks as they were.
      change: (index, block) -> narrower block that takes its place.
    """

    def __init__(self, blocks: Sequence[Block], change: Callable[[int, Block], Block]) -> None:
        self._blocks, self._change = blocks, change

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the blocks as they were."""
        if isinstance(self._blocks, ReadBlocks):
            return self._blocks.nbytes
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tuple(self._blocks)))

    def read(self, i: int) -> Block:
        """Read a block and change it.

        Args:
          i: Index of the block.
        """
        return self._change(i, self._blocks[i])


class ShapeBlocks(LazyBlocks):
    """Blocks of shapes, in place of a checkpoint's, for a planned run.

    Args:
      specs: Specs of every block.
      dtype: Type of the parameters in memory.
    """

    def __init__(self, specs: Sequence[Block], dtype: jnp.dtype) -> None:
        self.specs = specs
        self._dtype = dtype

    def fetch(self, i: int, mesh: Mesh | None = None) -> Block:
        """Return a block as shapes.

        Args:
          i: Index of the block.
          mesh: Without effect; a shape is the same in every process.

        Returns:
          Block of jax.ShapeDtypeStruct.
        """
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, self._dtype),
            self.specs[i],
            is_leaf=hf.is_spec,
        )

    def placed(self, block: Block, mesh: Mesh | None = None) -> Block:
        """Return a fetched block as planned arrays on the mesh.

        Args:
          block: Block of jax.ShapeDtypeStruct.
          mesh: Mesh; None for one device.

        Returns:
          Block of planned arrays.
        """
        return place(block, mesh)


def prefetch(
    blocks: Sequence[Block], order: Sequence[int] | None = None, mesh: Mesh | None = None
) -> Iterator[Block]:
    """Yield blocks on the mesh, reading a checkpoint's next one while the caller works.

    Args:
      blocks: Parameters of each block.
      order: Indices of the blocks to yield; None for all.
      mesh: Mesh; None for the default device.

    Yields:
      Parameters of a block.
    """
    order = range(len(blocks)) if order is None else order
    if not isinstance(blocks, LazyBlocks):
        yield from (place(blocks[i], mesh) for i in order)
        return
    # One thread, so that no more than one block is read ahead and lies in memory.
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        reading = [reader.submit(blocks.fetch, i, mesh) for i in order[:1]]
        for k in range(len(order)):
            placed = [blocks.placed(reading.pop().result(), mesh)]
            reading += [reader.submit(blocks.fetch, i, mesh) for i in order[k + 1 : k + 2]]
            yield placed.pop()  # nothing of it is held here while the caller works


def _finite(value: np.ndarray) -> bool:
    """Return True if all numbers of a tensor are finite in float32."""
    # The sum first: one pass without a boolean copy. It may overflow though all are finite, then
    # each is looked at. In float32, as NumPy has no isfinite for every checkpoint type.
    with np.errstate(over="ignore"):
        return bool(
            np.isfinite(np.sum(np.abs(value), dtype=np.float32))
            or np.isfinite(value.astype(np.float32)).all()
        )


def fetch(tensors: Tensors, specs: Any, mesh: Mesh | None = None) -> Any:
    """Read the parameters of a tree of specs into host memory, in their stored dtype.

    Args:
      tensors: Tensors of the checkpoint.
      specs: Pytree of Spec.
      mesh: Mesh of several processes, as in `LazyBlocks.fetch`.

    Returns:
      The tree with NumPy arrays.

    Raises:
      InputError: A tensor holds NaN or infinity.
    """

    def fetch_tensor(spec: hf.Spec) -> np.ndarray:
        # Reading takes longest, so each process reads the rows of its own devices alone.
        rows = own_rows(spec.shape, mesh)
        value = tensors.read(spec.name, rows)
        if not _finite(value):
            raise InputError(
                f"tensor {spec.name} holds NaN or infinity",
                "fetch the checkpoint again, or mend it before pruning",
            )
        if rows == WHOLE:
            return value
        # Pages of zeros that are never written take no memory.
        whole = np.zeros(spec.shape, value.dtype)
        whole[rows] = value
        return whole

    return jax.tree.map(fetch_tensor, specs, is_leaf=hf.is_spec)


def put_on_devices(values: Any, dtype: jnp.dtype, mesh: Mesh | None = None) -> Any:
    """Put fetched parameters on the devices, in the requested dtype.

    Args:
      values: Pytree of NumPy arrays.
      dtype: Type of the parameters.
      mesh: Mesh; None for the default device.

    Returns:
      Pytree of arrays on the devices.
    """
    if mesh is None or mesh.size == 1:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), values)
    # Cast on the devices, so that the host needs no second copy.
    return jax.tree.map(lambda x: x.astype(dtype), place(values, mesh))
