"""ADMM in float64 NumPy, from the paper and the released code, one output after the other.

Source: Boža 2024; fmfi-compbio/admm-pruning, lib/admm.py. Matrices are [in out] here, as in the
paper. The target of the block is from the issue: what the dense block gives on the same inputs.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.arch import Block, Model
from reference.small import run_block, weight


def lowest(score: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` lowest entries of a list, bool; of equal ones the first."""
    gone = np.zeros(score.shape, bool)
    gone.flat[np.argsort(score, axis=None, kind="stable")[:count]] = True
    return gone


def lowest_of_rows(score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the lowest entries of each output, score [in out]."""
    columns = [lowest(score[:, j], int(counts[j])) for j in range(score.shape[1])]
    return np.stack(columns, axis=1)


def lowest_of_groups(score: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return the n lowest of every m consecutive inputs, score [in out]."""
    gone = np.zeros(score.shape, bool)
    for j in range(score.shape[1]):
        for i in range(0, score.shape[0], m):
            gone[i : i + m, j] = lowest(score[i : i + m, j], n)
    return gone


def solve(
    weight: np.ndarray,
    gram: np.ndarray,
    fraction: float | np.ndarray,
    *,
    pattern: tuple[int, int] | None = None,
    scope: str = "row",
    target: np.ndarray | None = None,
    damp: float = 0.1,
    iterations: int = 20,
    released: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (W [out in], removed bool [out in]).

    Args:
      weight: W [out in].
      gram: X^T X [in in].
      fraction: To remove, of the matrix or of each row.
      pattern: n of m.
      scope: One threshold a "row" or a "matrix".
      target: X^T T [in out]; None: T is the dense output.
      damp: Ridge.
      iterations: Rounds.
      released: No schedule with one threshold a matrix, as in the released code.
    """
    w0 = weight.astype(np.float64).T
    gram = gram.astype(np.float64)
    norm = np.sqrt(np.diag(gram)) + 1e-8
    xx = gram / norm[:, None] / norm[None, :]
    ridge = damp * np.mean(np.diag(xx))
    w = w0 * norm[:, None]
    xy = xx @ w if target is None else target / norm[:, None]
    xy = xy + ridge * w
    system = xx + (ridge + 1.0) * np.eye(len(gram))
    u, gone = np.zeros_like(w), np.zeros(w.shape, bool)
    selections = max(1, int(0.75 * iterations))
    for t in range(iterations):
        if t < selections:
            share = 1 - (1 - (t + 1) / selections) ** 3
            gone = chosen(np.abs(w + u), fraction, share, pattern, scope, released)
        z = np.where(gone, 0.0, w + u)
        u = u + (w - z)
        w = np.linalg.solve(system, xy + z - u)
    z = np.where(gone, 0.0, w + u)
    return (z / norm[:, None]).T, gone.T


def chosen(
    score: np.ndarray,
    fraction: float | np.ndarray,
    share: float,
    pattern: tuple[int, int] | None,
    scope: str,
    released: bool,
) -> np.ndarray:
    """Return the entries that are removed when a share of all removals is due."""
    inputs, outputs = score.shape
    if pattern:
        n, m = pattern
        candidates = lowest_of_groups(score, n, m)
        score = np.where(candidates, score, np.inf)
        fraction = n / m
    elif scope == "matrix" and released:
        share = 1.0
    if scope == "matrix":
        # Transposed: of equal entries the first is the first of the first output.
        return lowest(score.T, due(inputs * outputs, float(fraction), share)).T
    fractions = np.broadcast_to(fraction, outputs)
    return lowest_of_rows(score, np.array([due(inputs, f, share) for f in fractions]))


def due(size: int, fraction: float, share: float) -> int:
    """Return how many of `size` entries are to be gone now."""
    return int(int(size * fraction) * share + 1e-9)


def solve_block(
    m: Model,
    block: Block,
    x: np.ndarray,
    stages: Sequence[tuple[str, Sequence[str]]],
    last: str,
    fraction: float,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Return {slot: W [out in]} of a block whose linears are solved in turn.

    Args:
      m: Only its architecture is used.
      block: The dense block.
      x: Its inputs [b t d].
      stages: (tap, slots that read it), in the order of the work.
      last: Slot whose target is the dense residual stream less the pruned one; the others keep
        their dense outputs. Empty: all do.
      fraction: To remove.
      scale: Factor of a branch before it is added to the stream.
      **options: Of `solve`.
    """
    dense_y, dense_taps = run_block(m, block, x)
    solved: dict[str, np.ndarray] = {}
    for tap, slots in stages:
        y, taps = run_block(
            m, block.replace(**{n: changed(block, n, w) for n, w in solved.items()}), x
        )
        inputs = taps[tap].reshape(-1, taps[tap].shape[-1])
        new = {}
        for slot in slots:
            wanted = dense_taps[slot]
            if slot == last:
                # Of what the dense block adds to the stream, all that is not this linear's.
                change = np.asarray(dense_y, np.float64) - np.asarray(y, np.float64)
                wanted = taps[slot] + change / scale
            bias = getattr(block, slot).b
            if bias is not None:
                wanted = wanted - np.asarray(bias, np.float64)
            target = inputs.T @ wanted.reshape(len(inputs), -1)
            gram = inputs.T @ inputs
            new[slot], _ = solve(weight(block, slot), gram, fraction, target=target, **options)
        solved |= new
    return solved


def changed(block: Block, slot: str, w: np.ndarray) -> Any:
    """Return the linear of a slot with another matrix."""
    return getattr(block, slot).replace(w=jnp.asarray(w, jnp.float32))
