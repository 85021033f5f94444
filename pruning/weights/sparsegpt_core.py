"""SparseGPT (Frantar & Alistarh 2023): prune a linear column by column, each removed weight's error made good by the columns to come.

Maths first, below it the layer-wise method made of it. Letters as in the paper: H = X X^T of the layer's inputs, W its weights, U the
upper Cholesky factor of H^-1, whose row i says how an error in column i is best spread over the columns after it (Algorithm 1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Gram
from pruning.linalg import inverse_factor

Mask = jax.Array  # bool; True is kept

COLUMNS = 128  # columns decided on together: the paper's B
STEPS = 4  # columns swept between two matrix products with the errors so far
TRIES = 7  # how often a factorisation is tried
RAISE, LEAST = 10.0, 1e-6  # how much more damping each time, and the least of it then


class Factor(NamedTuple):
    """u: upper Cholesky factor of the damped H^-1, float32 [c c]; dead: inputs that never fire, bool [c]; damping: as a share of H's mean
    diagonal, float32 [], NaN if no damping tried made H positive definite."""

    u: jax.Array
    dead: jax.Array
    damping: jax.Array


def hessian(gram: Gram) -> jax.Array:
    """H = 2/n X X^T [c c] over n sequences: the scale of the released code, which only dead inputs (H_ii set to 1) can tell."""
    return gram.total * (2.0 / gram.samples)


def damped(h: jax.Array, damp: jax.Array | float) -> jax.Array:
    """H [c c] with 1 where an input never fires, and `damp` times its mean diagonal added to the diagonal."""
    diagonal = jnp.diagonal(h)
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    return jnp.fill_diagonal(h, diagonal + damp * jnp.mean(diagonal), inplace=False)


def factor(h: jax.Array, damp: float) -> Factor:
    """Factor H [c c]; while that fails, damp RAISE times more; TRIES attempts in all."""

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tries, _, u = state
        return (tries < TRIES) & ~jnp.all(jnp.isfinite(u))

    def attempt(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        tries, share, _ = state
        share = jnp.where(tries == 0, damp, jnp.maximum(share * RAISE, LEAST))
        return tries + 1, share, inverse_factor(damped(h, share))

    _, share, u = jax.lax.while_loop(
        failed, attempt, (jnp.asarray(0), jnp.asarray(0.0), jnp.full_like(h, jnp.nan))
    )
    return Factor(u, jnp.diagonal(h) == 0, jnp.where(jnp.all(jnp.isfinite(u)), share, jnp.nan))


Keep = Callable[[jax.Array, jax.Array], Mask]  # (score [out c], count) -> bool [out c]
Decide = Callable[
    [jax.Array, Sequence[jax.Array]], Mask
]  # (score [c rows], a count a matrix) -> bool [c rows]


def _decide_each(keep: Keep, rows: Sequence[int]) -> Decide:
    """`keep` for each of the matrices whose rows lie side by side."""

    def decide(score: jax.Array, counts: Sequence[jax.Array]) -> Mask:
        parts = jnp.split(score.T, np.cumsum(rows)[:-1], axis=0)
        return jnp.concatenate([keep(s, n) for s, n in zip(parts, counts, strict=True)]).T

    return decide


def _columns(w: jax.Array, u: jax.Array, kept: Mask) -> tuple[jax.Array, jax.Array]:
    """Columns w [s rows] one after the other, u [s s] their corner of U: (what they become, their errors over U_ii), both [s rows]."""
    new, errors = [], []
    for i in range(len(w)):
        errors.append(jnp.where(kept[i], 0.0, w[i] / u[i, i]))
        new.append(jnp.where(kept[i], w[i], 0.0))
        w = w - u[i][:, None] * errors[i][None, :]
    return jnp.stack(new), jnp.stack(errors)


def _block(
    w: jax.Array, u: jax.Array, kept: Mask, step: int, decide: Callable[[jax.Array], Mask] | None
) -> tuple[jax.Array, ...]:
    """A block's columns w [b rows], `step` at a time, u [b b] their corner of U: (new, errors, kept), each [b rows].

    kept: what stays, unless `decide` (scores [s rows] -> bool) settles it when the sweep gets there.
    """

    def sweep(
        errors: jax.Array, xs: tuple[jax.Array, jax.Array, Mask]
    ) -> tuple[jax.Array, tuple[jax.Array, Mask]]:
        start, w, kept = xs
        w = (
            w - jax.lax.dynamic_slice_in_dim(u, start, step, 1).T @ errors
        )  # those to come are still zero
        corner = jax.lax.dynamic_slice(u, (start, start), (step, step))
        if decide:
            kept = decide((w / jnp.diagonal(corner)[:, None]) ** 2)
        new, e = _columns(w, corner, kept)
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
    """All columns w [c rows], blocks of `size` (which divides c), of which the first `inputs` are real: (new, kept)."""

    def sweep(
        errors: jax.Array, xs: tuple[jax.Array, jax.Array, list[jax.Array]]
    ) -> tuple[jax.Array, tuple[jax.Array, Mask]]:
        start, w, counts = xs
        w = w - jax.lax.dynamic_slice_in_dim(u, start, size, 1).T @ errors
        corner = jax.lax.dynamic_slice(u, (start, start), (size, size))
        if group:
            new, e, kept = _block(
                w, corner, jnp.ones(w.shape, bool), group, lambda score: decide(score, counts)
            )
        else:
            real = (start + jnp.arange(size) < inputs)[:, None]
            score = jnp.where(real, (w / jnp.diagonal(corner)[:, None]) ** 2, jnp.inf)
            new, e, kept = _block(w, corner, decide(score, counts), STEPS, None)
        return jax.lax.dynamic_update_slice_in_dim(errors, e, start, 0), (new, kept)

    starts = jnp.arange(0, len(w), size)
    _, (new, kept) = jax.lax.scan(
        sweep, jnp.zeros_like(w), (starts, w.reshape(len(starts), size, -1), list(quotas))
    )
    return new.reshape(w.shape), kept.reshape(w.shape)


def solve(
    ws: Sequence[jax.Array], f: Factor, counts: Sequence[jax.Array], keep: Keep, group: int | None
) -> list[tuple[jax.Array, Mask]]:
    """Prune matrices that read the same inputs, in one sweep over their columns.

    Args:
      ws: [out in] each; worked on in float32, given back in their own type.
      f: of their common inputs.
      counts: for each, how many entries go: [blocks] or [blocks out] as `patterns.per_column_block` has it, or [] with a group.
      keep: chooses by the score W^2 / U_ii^2 (eq. 3 of the paper), the lowest go.
      group: None: a block's entries are chosen when the sweep reaches it. m: those of every m consecutive columns are chosen when the
        sweep reaches these, as the paper does for n:m.
    Returns (W [out in], kept bool [out in]) for each.
    """
    rows, inputs = [len(w) for w in ws], ws[0].shape[1]
    size = COLUMNS if group is None else group * max(1, COLUMNS // group)
    blocks = -(-inputs // size)
    pad = (0, blocks * size - inputs)
    # Columns lie as rows, so each step of the sweep reads and writes consecutive memory. Padding is neither pruned nor spread to.
    w = jnp.concatenate([w.astype(jnp.float32) for w in ws]).T
    w = jnp.pad(jnp.where(f.dead[:, None], 0.0, w), (pad, (0, 0)))
    u = jnp.pad(f.u, (pad, pad)) + jnp.diag(jnp.pad(jnp.zeros(inputs), pad, constant_values=1.0))
    quotas = [jnp.broadcast_to(n, (blocks,)) if n.ndim == 0 else n for n in counts]
    with jax.default_matmul_precision("highest"):
        new, kept = _sweep(w, u, quotas, _decide_each(keep, rows), inputs, size, group)
    ends = np.cumsum(rows)[:-1]
    parts = (jnp.split(x[:inputs].T, ends) for x in (new, kept))
    return [(n.astype(w.dtype), k & ~f.dead[None, :]) for w, n, k in zip(ws, *parts, strict=True)]
