"""Patterns: one threshold a matrix, the lowest of each row or column block, n of every m inputs."""

import functools
import re

import numpy as np

from models.errors import InputError
from pruning.weights.patterns_core import (
    Pattern,
    keep_budget_per_matrix,
    keep_count_per_matrix,
    keep_in_column_block,
    keep_n_of_m,
    keep_over_column_blocks,
    keep_per_row,
)


def _truncate(total: int, fraction: np.ndarray) -> np.ndarray:
    """Return int(fraction * total) in float64, int32 of the fraction's shape."""
    # As the papers' code counts: 0.7 of 704 is 492. A float32 product is off by one for some
    # widths.
    return (np.asarray(fraction, np.float64) * total).astype(np.int32)


def _counts_per_matrix(shape: tuple[int, int], fraction: np.ndarray) -> np.ndarray:
    """Return the entries to remove from a matrix, int32 ()."""
    if np.ndim(fraction):
        # Broadcasting would compare the rows' thresholds with columns where a matrix is square.
        raise InputError(
            "gives every row its own sparsity, one threshold a matrix cannot follow it",
            "prune by row",
            field="allocation",
        )
    return _truncate(shape[0] * shape[1], fraction)


def _counts_per_row(shape: tuple[int, int], fraction: np.ndarray) -> np.ndarray:
    """Return the entries to remove from each row, int32 () or [out]."""
    return _truncate(shape[1], fraction)


def _counts_per_column_block(
    columns: int, shape: tuple[int, int], fraction: np.ndarray
) -> np.ndarray:
    """Return the entries to remove from each block of columns, int32 [blocks] or [blocks out]."""
    ends = np.minimum(np.arange(columns, shape[1] + columns, columns), shape[1])
    if np.ndim(fraction):
        # Differences of running counts, so that a row loses int(in * fraction) over all blocks.
        running = _truncate(1, ends[:, None] * np.asarray(fraction, np.float64))
        return np.diff(running, axis=0, prepend=np.int32(0))
    # Blocks are counted by themselves, as in the official code: the last one may be narrower.
    return _truncate(1, np.diff(ends, prepend=0) * shape[0] * np.float64(fraction))


per_matrix = Pattern(_counts_per_matrix, keep_budget_per_matrix, by_row=False)
exact_per_matrix = Pattern(_counts_per_matrix, keep_count_per_matrix, by_row=False)
per_row = Pattern(_counts_per_row, keep_per_row)


@functools.cache
def per_column_block(columns: int) -> Pattern:
    """Return the pattern with one threshold for each block of consecutive columns, as SparseGPT.

    With a budget of rows, every row has its own threshold in each block.

    Args:
      columns: Columns in a block; the last may have fewer.
    """
    counts = functools.partial(_counts_per_column_block, columns)
    return Pattern(counts, keep_in_column_block, whole=keep_over_column_blocks)


# Cached: equal patterns must be one static argument, or a second run would compile again.
@functools.cache
def n_of_m(n: int, m: int) -> Pattern:
    """Return the pattern of n zeros in every m consecutive inputs, whatever fraction is asked for.

    Args:
      n: Zeros in a group.
      m: Size of a group.
    """

    def counts(shape: tuple[int, int], fraction: np.ndarray) -> np.ndarray:
        if shape[1] % m:
            raise InputError(
                f"does not fit: {shape[1]} inputs of a linear are not a multiple of {m}",
                "choose an M that divides them",
                field="pattern",
                value=f"{n}:{m}",
            )
        return np.asarray(n, np.int32)

    return Pattern(counts, functools.partial(keep_n_of_m, m), m)


def parse_pattern(text: str) -> tuple[int, int] | None:
    """Parse the text of a pattern.

    Args:
      text: "unstructured", or "n:m".

    Returns:
      (n, m); None for "unstructured".

    Raises:
      InputError: The text is neither, or not 0 < n < m.
    """
    if text == "unstructured":
        return None
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text)
    n, m = map(int, match.groups()) if match else (0, 0)
    if not 0 < n < m:
        raise InputError(
            "must be unstructured, or N:M with 0 < N < M such as 2:4", field="pattern", value=text
        )
    return n, m
