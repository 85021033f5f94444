"""Removal of units of a block: `mask` zeroes them, `cut` makes the arrays narrower.

Both compute the same function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Block, Group, Member, experts_of, linear_of, with_linears
from models.layers import Linear, Norm
from models.programs import program

# (linear, its place in the group, units int [u]) -> changed linear.
Change = Callable[[Linear, Member, np.ndarray], Linear]


def _indices(member: Member, units: np.ndarray) -> np.ndarray:
    """Return the indices along the member's axis that belong to units (int [u]), in order."""
    return (units[:, None] * member.width + np.arange(member.width)[None, :]).reshape(-1)


def _keep_mask(size: int, removed: np.ndarray) -> np.ndarray:
    """Return a mask, bool [size], that is False at the removed indices."""
    # A mask has one length however many indices it removes, so zeroing compiles once. A scatter
    # would compile for every number of indices.
    keep = np.ones(size, bool)
    keep[removed] = False
    return keep


@program("rows zeroed")
def _zero_rows(p: Linear, keep: jax.Array) -> Linear:
    """Zero the output rows where `keep` (bool [out]) is False, biases included."""
    b = None if p.b is None else jnp.where(keep, p.b, 0)
    return Linear(jnp.where(keep[:, None], p.w, 0), b)


@program("columns zeroed")
def _zero_columns(w: jax.Array, keep: jax.Array) -> jax.Array:
    """Zero the input columns of w [out in] where `keep` (bool [in]) is False."""
    return jnp.where(keep[None, :], w, 0)


@program("units cut", static=(2,))
def take_entries(x: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """Return the entries of an array at these indices along an axis.

    Args:
      x: Array.
      indices: Indices, int [n].
      axis: Axis of the array.
    """
    return jnp.take(x, indices, axis=axis)


def zero_rows(p: Linear, rows: np.ndarray) -> Linear:
    """Zero output rows of a linear, with their biases.

    Args:
      p: Linear, w [out in].
      rows: Indices of the rows, int [r].

    Returns:
      Linear of the same shapes.
    """
    return _zero_rows(p, _keep_mask(p.w.shape[0], rows))


def _zero(p: Linear, member: Member, units: np.ndarray) -> Linear:
    indices = _indices(member, units)
    if member.axis == 0:
        return zero_rows(p, indices)
    return Linear(_zero_columns(p.w, _keep_mask(p.w.shape[1], indices)), p.b)


def _take(p: Linear, member: Member, units: np.ndarray) -> Linear:
    indices = _indices(member, units)
    w = take_entries(p.w, indices, member.axis)
    # A bias belongs to output rows: taking input columns leaves it whole.
    if member.axis == 1 or p.b is None:
        return Linear(w, p.b)
    return Linear(w, take_entries(p.b, indices, 0))


def units(block: Block, group: Group) -> int:
    """Count the units of a coupled group in a block.

    Args:
      block: Parameters of the block.
      group: Coupled group, such as the heads.

    Returns:
      Number of units.
    """
    w = linear_of(block, group.reader.name).w
    return w.shape[group.reader.axis] // group.reader.width


def _change_members(
    block: Block,
    group: Group,
    change: Change,
    change_norm: Callable[[Norm, Member, np.ndarray], Norm],
    units: np.ndarray,
) -> Block:
    """Apply a change to every linear and norm of a group."""
    members = (group.reader, *group.writers)
    linears = {m.name: change(linear_of(block, m.name), m, units) for m in members}
    norms = {m.name: change_norm(getattr(block, m.name), m, units) for m in group.norms}
    return with_linears(block, linears).replace(**norms)


def _zero_gains(p: Norm, member: Member, units: np.ndarray) -> Norm:
    """Zero gains, and scale the others so that the mean square is that of the channels left."""
    assert p.scale is not None
    # After the cut the norm divides by the mean over fewer channels; the zeros count here.
    keep = _keep_mask(p.scale.shape[0], _indices(member, units))
    factor = np.sqrt(keep.mean(), dtype=np.float32)
    return Norm(_scale_gains(p.scale, (keep * factor).astype(np.float32)), p.bias)


@program("gains scaled")
def _scale_gains(gains: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiply gains [channels] by factors (float32 [channels])."""
    return (gains.astype(jnp.float32) * factors).astype(gains.dtype)


def _take_gains(p: Norm, member: Member, units: np.ndarray) -> Norm:
    assert p.scale is not None
    return Norm(take_entries(p.scale, _indices(member, units), 0), p.bias)


def _append(p: Linear, member: Member, units: np.ndarray) -> Linear:
    count = len(_indices(member, units))
    edges = [(0, 0), (0, 0)]
    edges[member.axis] = (0, count)
    w: Any = np.pad(np.asarray(p.w), edges)
    if member.axis == 1 or p.b is None:
        return Linear(w, p.b)
    b: Any = np.pad(np.asarray(p.b), (0, count))
    return Linear(w, b)


def _append_gains(p: Norm, member: Member, units: np.ndarray) -> Norm:
    assert p.scale is not None
    gains, count = np.asarray(p.scale), len(_indices(member, units))
    # The norm then divides by the mean over more channels.
    factor = np.sqrt(len(gains) / (len(gains) + count))
    scaled: Any = np.pad((gains.astype(np.float32) * factor).astype(gains.dtype), (0, count))
    return Norm(scaled, p.bias)


def widen(block: Block, group: Group, count: int) -> Block:
    """Append units of zeros to a group of a block in host memory; it computes the same.

    Args:
      block: Parameters of the block, NumPy arrays.
      group: Coupled group.
      count: Number of units to append.

    Returns:
      Block with wider arrays.
    """
    if not count:
        return block
    return _change_members(block, group, _append, _append_gains, np.arange(count))


def first_experts(block: Block, count: int) -> Block:
    """Return the block with its first experts only.

    Args:
      block: Parameters or specs of the block.
      count: Experts that stay; the router is left as it is.
    """
    if count == experts_of(block):
        return block
    return block.replace(experts=getattr(block, "experts", ())[:count])


def keep_experts(block: Block, keep: np.ndarray) -> Block:
    """Remove experts, and their rows of the router.

    Args:
      block: Parameters of a block with experts.
      keep: True for the experts that stay, bool [experts].

    Returns:
      Block with fewer experts, numbered anew.
    """
    # Any: only the decoder's blocks have experts, and the protocol has none.
    of_decoder: Any = block
    kept = np.flatnonzero(keep)
    router = Linear(take_entries(of_decoder.router.w, kept, 0), of_decoder.router.b)
    return block.replace(router=router, experts=tuple(of_decoder.experts[e] for e in kept))


def mask(block: Block, group: Group, keep: np.ndarray) -> Block:
    """Zero the units of a group that are not kept, biases of their rows included.

    Args:
      block: Parameters of the block.
      group: Coupled group.
      keep: True for the units that stay, bool [units].

    Returns:
      Block of the same shapes.
    """
    removed = np.flatnonzero(~np.asarray(keep))
    return _change_members(block, group, _zero, _zero_gains, removed)


def cut(block: Block, group: Group, keep: np.ndarray) -> Block:
    """Remove the units of a group that are not kept.

    Args:
      block: Parameters of the block.
      group: Coupled group.
      keep: True for the units that stay, bool [units].

    Returns:
      Block with narrower arrays and the same outputs as after `mask`.
    """
    kept = np.flatnonzero(np.asarray(keep))
    return _change_members(block, group, _take, _take_gains, kept)
