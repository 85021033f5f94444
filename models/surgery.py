"""Removing parts of a block: `mask` writes zeros and keeps the shapes, `cut` takes the same channels away. Same function, fewer numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Block, Group, Member
from models.layers import Linear
from models.programs import program


def _entries(member: Member, units: np.ndarray) -> np.ndarray:
    """The indices along the member's axis that belong to units (int [u]), in order."""
    return (units[:, None] * member.width + np.arange(member.width)[None, :]).reshape(-1)


def _stays(size: int, gone: np.ndarray) -> np.ndarray:
    """bool [size]. A mask is as long whatever goes, so zeroing compiles once; a scatter would for every number of indices."""
    stays = np.ones(size, bool)
    stays[gone] = False
    return stays


@program("rows zeroed")
def _zero_rows(p: Linear, stays: jax.Array) -> Linear:
    """Zero the output rows where `stays` (bool [out]) is False, biases included."""
    b = None if p.b is None else jnp.where(stays, p.b, 0)
    return Linear(jnp.where(stays[:, None], p.w, 0), b)


@program("columns zeroed")
def _zero_columns(p: Linear, stays: jax.Array) -> Linear:
    """Zero the input columns where `stays` (bool [in]) is False."""
    return Linear(jnp.where(stays[None, :], p.w, 0), p.b)


@program("units cut", static=(2,))
def _take_entries(p: Linear, at: jax.Array, axis: int) -> Linear:
    """Keep the rows (axis 0, biases included) or columns (axis 1) at these indices."""
    b = p.b if axis == 1 or p.b is None else jnp.take(p.b, at, axis=0)
    return Linear(jnp.take(p.w, at, axis=axis), b)


def zero_rows(p: Linear, rows: np.ndarray) -> Linear:
    """Zero output rows of a linear, biases included.

    Args:
      p: The linear.
      rows: Indices, int [r].
    """
    return _zero_rows(p, _stays(p.w.shape[0], rows))


def _zero(p: Linear, member: Member, units: np.ndarray) -> Linear:
    at = _entries(member, units)
    if member.axis == 0:
        return zero_rows(p, at)
    return _zero_columns(p, _stays(p.w.shape[1], at))


def _take(p: Linear, member: Member, units: np.ndarray) -> Linear:
    return _take_entries(p, _entries(member, units), member.axis)


def units(block: Block, group: Group) -> int:
    """How many units of a coupled group a block has."""
    w = getattr(block, group.reader.name).w
    return w.shape[group.reader.axis] // group.reader.width


def _each(block: Block, group: Group, change: Any, at: np.ndarray) -> Block:
    members = (group.reader, *group.writers)
    return block.replace(**{m.name: change(getattr(block, m.name), m, at) for m in members})


def mask(block: Block, group: Group, keep: np.ndarray) -> Block:
    """The block with the units of `group` that `keep` (bool [units]) drops set to zero, biases of their rows included."""
    return _each(block, group, _zero, np.flatnonzero(~np.asarray(keep)))


def cut(block: Block, group: Group, keep: np.ndarray) -> Block:
    """The block without the units of `group` that `keep` (bool [units]) drops: narrower arrays, the same outputs as `mask`."""
    return _each(block, group, _take, np.flatnonzero(np.asarray(keep)))
