"""Two ways to store a matrix without its zeros, each undone to the bit.

`bitmask` keeps one bit an entry and the entries that are not zero. `macko` is the format of MACKO's
GPU kernels: each value with the number of zeros before it in 4 bits, rows one after the other.
A zero is an entry whose bits are all zero: -0.0 is kept as a value.

Source: Macko and Boža, MACKO-SpMV (https://github.com/vlejd/macko_spmv), for `macko`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_GAP = 16  # a stored value covers at most so many entries: itself and 15 zeros before it
_ALIGNED = 8  # MACKO's kernels load so many values at a time


class Packing(NamedTuple):
    """A way to store matrices.

    Attributes:
      parts: Endings of the stored tensors' names, in place of the matrix's ".weight".
      pack: Matrix [rows columns] -> stored tensors in the order of `parts`.
      unpack: (stored tensors, rows, columns) -> matrix; ValueError if they contradict each other.
      always: True to pack every matrix; False for only those that get smaller.
    """

    parts: tuple[str, ...]
    pack: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    unpack: Callable[[tuple[np.ndarray, ...], int, int], np.ndarray]
    always: bool


def _not_zero(matrix: np.ndarray) -> np.ndarray:
    """Return True where an entry has any bit, [rows columns]."""
    return matrix.view(f"u{matrix.itemsize}") != 0


def pack_bitmask(matrix: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pack a matrix as one bit an entry and its non-zero entries.

    Args:
      matrix: Matrix [rows columns].

    Returns:
      Bits, uint8 [rows ceil(columns/8)], the first entry lowest; entries in the order of rows [n].
    """
    mask = _not_zero(matrix)
    return np.packbits(mask, axis=1, bitorder="little"), matrix[mask]


def unpack_bitmask(stored: tuple[np.ndarray, ...], rows: int, columns: int) -> np.ndarray:
    """Undo `pack_bitmask`.

    Args:
      stored: What it returned.
      rows: Rows of the matrix.
      columns: Columns of the matrix.

    Returns:
      Matrix [rows columns].

    Raises:
      ValueError: The tensors contradict each other.
    """
    bits, values = stored
    if bits.dtype != np.uint8 or bits.shape != (rows, -(-columns // 8)) or values.ndim != 1:
        raise ValueError(f"a bit mask of shape {bits.shape} for a matrix of {rows} x {columns}")
    mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little").astype(bool)
    if np.count_nonzero(mask) != len(values):
        raise ValueError(f"{np.count_nonzero(mask)} bits are set for {len(values)} values")
    matrix = np.zeros((rows, columns), values.dtype)
    matrix[mask] = values
    return matrix


def pack_macko(matrix: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pack a matrix in MACKO's format.

    Args:
      matrix: Matrix [rows columns].

    Returns:
      Values [n], with a zero after each 15 zeros that precede an entry, and zeros at the end up to
      a multiple of 8; numbers of zeros before each value, two in a byte, the first one lower, uint8
      [n/2]; index of each row's first value and of the end, int32 [rows + 1].
    """
    rows, columns = matrix.shape
    # A sentinel behind each row stands for the zeros at its end.
    padded = np.ones((rows, columns + 1), bool)
    padded[:, :columns] = _not_zero(matrix)
    row, column = np.nonzero(padded)
    is_end = column == columns
    before = np.concatenate([[-1], column[:-1]])
    before[np.concatenate([[True], is_end[:-1]])] = -1
    gaps = column - before - 1
    # A gap of 16 or more is bridged by stored zeros, each at the end of 16 entries.
    counts = gaps // _GAP + 1
    last = np.cumsum(counts) - 1
    deltas = np.full(last[-1] + 1, _GAP - 1, np.uint8)
    deltas[last] = gaps % _GAP
    values = np.zeros(len(deltas), matrix.dtype)
    values[last[~is_end]] = matrix[row[~is_end], column[~is_end]]
    kept = np.ones(len(deltas), bool)
    kept[last[is_end]] = False
    values, deltas = values[kept], deltas[kept]
    row_indices = np.concatenate([[0], last[is_end] - np.arange(rows)]).astype(np.int32)
    padding = -len(values) % _ALIGNED
    values, deltas = np.pad(values, (0, padding)), np.pad(deltas, (0, padding))
    return values, deltas[::2] | deltas[1::2] << 4, row_indices


def unpack_macko(stored: tuple[np.ndarray, ...], rows: int, columns: int) -> np.ndarray:
    """Undo `pack_macko`.

    Args:
      stored: What it returned.
      rows: Rows of the matrix.
      columns: Columns of the matrix.

    Returns:
      Matrix [rows columns].

    Raises:
      ValueError: The tensors contradict each other.
    """
    values, pairs, ends = stored
    total = int(ends[-1]) if ends.size else -1
    fits = 0 <= total <= len(values) and 2 * len(pairs) == len(values) and pairs.dtype == np.uint8
    if not fits or ends.shape != (rows + 1,) or ends[0] != 0 or (np.diff(ends) < 0).any():
        raise ValueError(f"{len(values)} values and {len(pairs)} bytes of gaps in {rows} rows")
    deltas = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:total].astype(np.int64)
    ends = ends.astype(np.int64)
    places = np.concatenate([[0], np.cumsum(deltas + 1)])
    row = np.repeat(np.arange(rows), np.diff(ends))
    column = places[1:] - places[ends[:-1]][row] - 1
    # Fewer than 16 zeros are left behind the last value of a row.
    lengths = places[ends[1:]] - places[ends[:-1]]
    if (lengths > columns).any() or (lengths <= columns - _GAP).any():
        raise ValueError(f"rows of {lengths.min()} to {lengths.max()} entries, not {columns}")
    matrix = np.zeros((rows, columns), values.dtype)
    matrix[row, column] = values[:total]
    return matrix


PACKINGS = {
    "bitmask": Packing((".bitmask", ".values"), pack_bitmask, unpack_bitmask, always=False),
    # MACKO's own script names the parts so, and expects every linear of the blocks in them.
    "macko": Packing((".c_0", ".c_1", ".c_2"), pack_macko, unpack_macko, always=True),
}
