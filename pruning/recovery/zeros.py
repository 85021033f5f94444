"""The zeros that pruning made: find them, keep them through updates, and check that they stayed.

An entry of a linear's matrix that is zero stays zero. A bias stays zero where its whole row is, as
that output was removed. All else is free.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Block
from models.layers import Linear
from models.programs import planner, program
from models.sharding import to_host


def _is_linear(node: Any) -> bool:
    return isinstance(node, Linear)


def _mask(node: Any) -> Any:
    """Return which entries of a linear may change, or of another leaf: all."""
    if not _is_linear(node):
        return jnp.ones(node.shape, bool)
    kept = node.w != 0
    b = node.b
    return Linear(kept, None if b is None else (b != 0) | jnp.any(kept, axis=1))


def masks_of(block: Any) -> Any:
    """Return a tree like the block's, bool: True where an entry may change.

    A pure function, to be called within jit.

    Args:
      block: Parameters of the pruned block, or any other tree with linears.
    """
    return jax.tree.map(_mask, block, is_leaf=_is_linear)


def keep_zeros(new: Any, old: Any) -> Any:
    """Return new parameters in the types of the old, with zeros at the same entries of matrices.

    An entry that rounding would make zero keeps its old value. A pure function, to be called within
    jit.

    Args:
      new: Parameters after updates, of any float type.
      old: Parameters before.
    """

    def keep(x: jax.Array, node: jax.Array) -> jax.Array:
        x = x.astype(node.dtype)
        if x.ndim != 2:
            return x
        return jnp.where((x == 0) | (node == 0), node, x)

    return jax.tree.map(keep, new, old)


@program("zeros compared")
def _compare(new: Block, old: Block) -> tuple[jax.Array, jax.Array]:
    """Return the number of zeros in the old block's matrices, and of entries that differ in it."""
    matrices = [
        (x == 0, y == 0)
        for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        if x.ndim == 2
    ]
    # int32: a matrix has fewer than 2^31 entries, a block may have more, so they are added outside.
    before = jnp.stack([jnp.sum(y, dtype=jnp.int32) for _, y in matrices])
    changed = jnp.stack([jnp.sum(x != y, dtype=jnp.int32) for x, y in matrices])
    return before, changed


def check_zeros(new: Block, old: Block) -> int:
    """Check that a recovered block has zeros at the same entries as before, and count them.

    Args:
      new: The recovered block.
      old: The pruned block.

    Returns:
      Number of zeros in its matrices.

    Raises:
      AssertionError: A zero was lost or made, which is a bug.
    """
    zeros, changed = (int(to_host(x).astype(np.int64).sum()) for x in _compare(new, old))
    # A plan has no values to compare.
    if changed and not planner():
        raise AssertionError(f"recovery changed which weights are zero: {changed} of them")
    return zeros
