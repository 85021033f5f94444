"""SparseGPT (Frantar & Alistarh 2023), maths: prune column by column, correct the columns to come.

Letters as in the paper: H = X X^T of the layer's inputs, W its weights, U the upper Cholesky factor
of H^-1. Row i of U says how an error in column i is best spread over later columns (Algorithm 1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Gram
from pruning.linalg import inverse_factor
from pruning.weights.patterns_core import Mask

COLUMNS = 128  # columns decided on together: the paper's B
STEPS = 4  # columns swept between two matrix products; 16 run no faster, and compile slower
ATTEMPTS = 7  # factorisations tried, each with more damping
DAMPING_GROWTH = 10.0
FIRST_DAMPING = 1e-6  # least damping of a second attempt, for runs that ask for none


class Factor(NamedTuple):
    """Factor of a damped H.

    Attributes:
      u: Upper Cholesky factor U of H^-1, float32 [c c].
      dead: Inputs that never fire, bool [c].
      damping: Share of H's mean diagonal that was added, float32 []; NaN if no damping tried made
        H positive definite.
    """

    u: jax.Array
    dead: jax.Array
    damping: jax.Array


def hessian(gram: Gram) -> jax.Array:
    """Return H = 2/n X X^T [c c] over n sequences.

    Args:
      gram: Sum of x x^T, and the number of sequences.
    """
    chex.assert_rank(gram.total, 2)
    # The scale of the official code. Only dead inputs, whose H_ii becomes 1, can tell it.
    return gram.total * (2.0 / gram.samples)


def damped(h: jax.Array, damp: jax.Array | float) -> jax.Array:
    """Add damping to H's diagonal, after setting it to 1 where an input never fires.

    Args:
      h: H [c c].
      damp: Share of the mean diagonal to add.
    """
    diagonal = jnp.diagonal(h)
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    return jnp.fill_diagonal(h, diagonal + damp * jnp.mean(diagonal), inplace=False)


def factor(h: jax.Array, damp: float) -> Factor:
    """Factor H, with ten times the damping while that fails.

    Args:
      h: H, float32 [c c].
      damp: Share of the mean diagonal to add at first.
    """
    chex.assert_shape(h, (len(h), len(h)))
    chex.assert_type(h, jnp.float32)

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        attempts, _, u = state
        # A factorisation that fails gives NaN and never raises.
        return (attempts < ATTEMPTS) & ~jnp.all(jnp.isfinite(u))

    def attempt(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        attempts, share, _ = state
        more = jnp.maximum(share * DAMPING_GROWTH, FIRST_DAMPING)
        share = jnp.where(attempts == 0, damp, more)
        return attempts + 1, share, inverse_factor(damped(h, share))

    start = (jnp.asarray(0), jnp.asarray(0.0), jnp.full_like(h, jnp.nan))
    with jax.named_scope("factor"):
        _, share, u = jax.lax.while_loop(failed, attempt, start)
    return Factor(u, jnp.diagonal(h) == 0, jnp.where(jnp.all(jnp.isfinite(u)), share, jnp.nan))


# (score [out c], count) -> kept, bool [out c].
Keep = Callable[[jax.Array, jax.Array], Mask]
# (score [c rows], a count for each matrix) -> kept, bool [c rows].
Decide = Callable[[jax.Array, Sequence[jax.Array]], Mask]


def _decide_each(keep: Keep, rows: Sequence[int]) -> Decide:
    """Return `keep` applied to each of the matrices whose rows lie side by side."""

    def decide(score: jax.Array, counts: Sequence[jax.Array]) -> Mask:
        with jax.named_scope("select"):
            parts = jnp.split(score.T, np.cumsum(rows)[:-1], axis=0)
            return jnp.concatenate([keep(s, n) for s, n in zip(parts, counts, strict=True)]).T

    return decide


def _sweep_columns(w: jax.Array, u: jax.Array, kept: Mask) -> tuple[jax.Array, jax.Array]:
    """Prune columns w [s rows] one by one; u [s s] is their corner of U.

    Returns:
      The new columns, and their errors over U_ii, both [s rows].
    """
    new, errors = [], []
    for i in range(len(w)):
        errors.append(jnp.where(kept[i], 0.0, w[i] / u[i, i]))
        new.append(jnp.where(kept[i], w[i], 0.0))
        # U is upper triangular, so columns that were decided before take in nothing.
        w = w - u[i][:, None] * errors[i][None, :]
    return jnp.stack(new), jnp.stack(errors)


def _sweep_block(
    w: jax.Array, u: jax.Array, kept: Mask, step: int, decide: Callable[[jax.Array], Mask] | None
) -> tuple[jax.Array, ...]:
    """Prune a block's columns, `step` at a time.

    Args:
      w: Columns, float32 [b rows].
      u: Their corner of U, [b b].
      kept: What stays, bool [b rows], unless `decide` is given.
      step: Columns between two matrix products; divides b.
      decide: Scores [step rows] -> kept, called when the sweep reaches the columns.

    Returns:
      New columns, errors over U_ii, kept: each [b rows].
    """

    def sweep(
        errors: jax.Array, xs: tuple[jax.Array, jax.Array, Mask]
    ) -> tuple[jax.Array, tuple[jax.Array, Mask]]:
        start, w, kept = xs
        # Errors of columns to come are still zero, so the product may take all of them.
        w = w - jax.lax.dynamic_slice_in_dim(u, start, step, 1).T @ errors
        corner = jax.lax.dynamic_slice(u, (start, start), (step, step))
        if decide:
            kept = decide((w / jnp.diagonal(corner)[:, None]) ** 2)
        new, e = _sweep_columns(w, corner, kept)
        return jax.lax.dynamic_update_slice_in_dim(errors, e, start, 0), (new, kept)

    starts = jnp.arange(0, len(w), step)
    parts, masks = (x.reshape(len(starts), step, -1) for x in (w, kept))
    errors, (new, kept) = jax.lax.scan(sweep, jnp.zeros_like(w), (starts, parts, masks))
    return new.reshape(w.shape), errors, kept.reshape(w.shape)


def _sweep(
    w: jax.Array,
    u: jax.Array,
    quotas: Sequence[jax.Array],
    decide: Decide,
    inputs: int,
    size: int,
    group: int | None,
) -> tuple[jax.Array, Mask]:
    """Prune all columns, a block at a time.

    Args:
      w: Columns, float32 [c rows].
      u: U [c c].
      quotas: Counts of each matrix, by block: [blocks ...].
      decide: Chooses what stays.
      inputs: Columns that are real; the rest is padding.
      size: Columns of a block; divides c.
      group: m of n:m, else None.

    Returns:
      New columns and kept, both [c rows].
    """

    def sweep(
        errors: jax.Array, xs: tuple[jax.Array, jax.Array, list[jax.Array]]
    ) -> tuple[jax.Array, tuple[jax.Array, Mask]]:
        start, w, counts = xs
        w = w - jax.lax.dynamic_slice_in_dim(u, start, size, 1).T @ errors
        corner = jax.lax.dynamic_slice(u, (start, start), (size, size))
        if group:
            all_kept = jnp.ones(w.shape, bool)
            new, e, kept = _sweep_block(
                w, corner, all_kept, group, lambda score: decide(score, counts)
            )
        else:
            real = (start + jnp.arange(size) < inputs)[:, None]
            # Padding scores infinity: the block's count falls on real entries alone.
            score = jnp.where(real, (w / jnp.diagonal(corner)[:, None]) ** 2, jnp.inf)
            new, e, kept = _sweep_block(w, corner, decide(score, counts), STEPS, None)
        return jax.lax.dynamic_update_slice_in_dim(errors, e, start, 0), (new, kept)

    starts = jnp.arange(0, len(w), size)
    blocks = (starts, w.reshape(len(starts), size, -1), list(quotas))
    _, (new, kept) = jax.lax.scan(sweep, jnp.zeros_like(w), blocks)
    return new.reshape(w.shape), kept.reshape(w.shape)


def solve(
    ws: Sequence[jax.Array], f: Factor, counts: Sequence[jax.Array], keep: Keep, group: int | None
) -> list[tuple[jax.Array, Mask]]:
    """Prune matrices that read the same inputs, in one sweep over their columns.

    Source: Frantar & Alistarh 2023, Algorithm 1.

    Args:
      ws: Matrices [out in]; worked on in float32, returned in their own types.
      f: Factor of their common inputs.
      counts: Entries to remove from each: [blocks] or [blocks out] as `patterns.per_column_block`
        counts them, or [] with a group.
      keep: Chooses by the score W^2 / U_ii^2 (eq. 3); the lowest go.
      group: None: a block's entries are chosen when the sweep reaches the block. m: those of every
        m consecutive columns are chosen when the sweep reaches these, as the paper does for n:m.

    Returns:
      W [out in] and kept, bool [out in], of each.
    """
    chex.assert_rank(ws, 2)
    inputs = ws[0].shape[1]
    chex.assert_shape([*ws], (None, inputs))
    chex.assert_shape([f.u, f.dead], [(inputs, inputs), (inputs,)])
    rows = [len(w) for w in ws]
    # Whole groups only: a group over the end of a block would be chosen in two parts.
    size = COLUMNS if group is None else group * max(1, COLUMNS // group)
    blocks = -(-inputs // size)
    pad = (0, blocks * size - inputs)
    # Columns lie as rows, so that each step of the sweep reads and writes consecutive memory.
    w = jnp.concatenate([w.astype(jnp.float32) for w in ws]).T
    # Padding is neither pruned nor receives errors.
    w = jnp.pad(jnp.where(f.dead[:, None], 0.0, w), (pad, (0, 0)))
    u = jnp.pad(f.u, (pad, pad)) + jnp.diag(jnp.pad(jnp.zeros(inputs), pad, constant_values=1.0))
    quotas = [jnp.broadcast_to(n, (blocks,)) if n.ndim == 0 else n for n in counts]
    # Errors pass through all columns to come, and so would the rounding of TPUs' bfloat16 passes.
    with jax.default_matmul_precision("highest"), jax.named_scope("sweep"):
        new, kept = _sweep(w, u, quotas, _decide_each(keep, rows), inputs, size, group)
    ends = np.cumsum(rows)[:-1]
    parts = (jnp.split(x[:inputs].T, ends) for x in (new, kept))
    return [(n.astype(w.dtype), k & ~f.dead[None, :]) for w, n, k in zip(ws, *parts, strict=True)]
