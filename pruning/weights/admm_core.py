"""ADMM (Boža 2024), maths: alternate between a linear system and the nearest sparse matrix.

A linear W [out in] with inputs X [tokens in] is pruned so that its outputs stay near a target T.
With R = T - X W^T, what the dense linear leaves of the target, the sparse Z shall minimise

    |X (Z - W)^T - R|^2 + ridge |Z - W|^2.

Inputs are scaled to norm 1 first, so that rho = 1 and the ridge mean the same for every linear, and
|W| is Wanda's score. W solves the system, Z is sparse, U is the scaled dual, as in the paper, whose
matrices are transposed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pruning.linalg import inverse_factor
from pruning.weights.patterns_core import Mask, Pattern

RHO = 1.0  # penalty of Z != W, in units of the inputs' norms
LEAST_NORM = 1e-8  # added to norms, as in the official code: an input may never fire


class System(NamedTuple):
    """Normal equations of the linears that read the same inputs.

    Attributes:
      h: X^T X of inputs of norm 1, with the ridge on its diagonal, float32 [in in].
      inverse: (h + rho I)^-1 [in in].
      norms: Norms of the inputs [in].
      ridge: What is added to the diagonal, [].
    """

    h: jax.Array
    inverse: jax.Array
    norms: jax.Array
    ridge: jax.Array


class Residual(NamedTuple):
    """Part of a target that the dense linear leaves, R = T - X W^T, as sums over tokens.

    Attributes:
      cross: R^T X, float32 [out in].
      square: Sum of squares of R, [].
    """

    cross: jax.Array
    square: jax.Array


class Settings(NamedTuple):
    """Settings of the rounds; hashable, a static argument.

    Attributes:
      iterations: Rounds.
      pattern: Chooses the entries to remove.
      unstructured: What the pattern is without groups: by row, or over the whole matrix. In groups,
        it chooses those entries that go first.
      gradual: Whether ever more entries are removed over the rounds that choose the mask.
    """

    iterations: int
    pattern: Pattern
    unstructured: Pattern
    gradual: bool = True

    @property
    def selections(self) -> int:
        """Return the number of rounds that choose the mask: 15 of 20, as in the paper."""
        return max(1, 3 * self.iterations // 4)


class Pruned(NamedTuple):
    """A pruned linear.

    Attributes:
      w: Weights in their own type, [out in].
      kept: Entries that stay, bool [out in].
      error: Squared error of the outputs over the sum of squares of their target, float32 [].
    """

    w: jax.Array
    kept: Mask
    error: jax.Array


def prepare(total: jax.Array, damp: float) -> System:
    """Invert the system of some inputs; with rho on its diagonal it factors whatever they are.

    Args:
      total: X^T X, float32 [in in].
      damp: Ridge, as a share of the mean diagonal.
    """
    chex.assert_shape(total, (len(total), len(total)))
    chex.assert_type(total, jnp.float32)
    with jax.default_matmul_precision("highest"), jax.named_scope("invert"):
        norms = jnp.sqrt(jnp.diagonal(total)) + LEAST_NORM
        h = total / norms[:, None] / norms[None, :]
        ridge = damp * jnp.mean(jnp.diagonal(h))
        identity = jnp.eye(len(h))
        h = h + ridge * identity
        u = inverse_factor(h + RHO * identity)
        return System(h, u.T @ u, norms, ridge)


def _select(score: jax.Array, count: jax.Array, left: jax.Array, s: Settings) -> Mask:
    """Choose what stays in a round.

    Args:
      score: Scores, float32 [out in].
      count: Entries to remove in the end, as `Pattern.counts` gives them.
      left: Share of them that go in later rounds, [].
      s: Settings.

    Returns:
      Kept, bool [out in].
    """

    def removed_now(n: jax.Array) -> jax.Array:
        # Exact in the last round, where nothing is left, however many entries there are.
        return n - jnp.ceil(n.astype(jnp.float32) * left).astype(jnp.int32)

    if not s.pattern.group:
        return s.pattern.keep(score, removed_now(count))
    kept = s.pattern.keep(score, count)
    rows = 1 if s.unstructured.by_row else len(score)
    total = count * (rows * score.shape[1] // s.pattern.group)
    # Groups lose their lowest entries at different rounds, as in the official code.
    return s.unstructured.keep(jnp.where(kept, jnp.inf, score), removed_now(total))


def _shares_left(s: Settings) -> jax.Array:
    """Return the share of the entries that is still to go after each selection, float32."""
    rounds = np.arange(1, s.selections + 1) / s.selections
    # A cubic schedule: most go early, while the others can still make up for them.
    return jnp.asarray((1 - rounds) ** 3 if s.gradual else np.zeros(s.selections), jnp.float32)


def _rounds(
    w: jax.Array, wanted: jax.Array, inverse: jax.Array, count: jax.Array, s: Settings
) -> tuple[jax.Array, Mask]:
    """Run all rounds.

    Args:
      w: Dense weights for inputs of norm 1, float32 [out in].
      wanted: Right-hand side of the system, [out in].
      inverse: (h + rho I)^-1 [in in].
      count: Entries to remove.
      s: Settings.

    Returns:
      Z and what stays, both [out in].
    """

    def update(v: jax.Array, kept: Mask) -> jax.Array:
        # v is W + U. Z is its kept part, and the new U the rest.
        z_minus_u = jnp.where(kept, v, -v)
        return (wanted + RHO * z_minus_u) @ inverse + jnp.where(kept, 0.0, v)

    def select_and_update(
        state: tuple[jax.Array, Mask], left: jax.Array
    ) -> tuple[tuple[jax.Array, Mask], None]:
        v, _ = state
        with jax.named_scope("select"):
            kept = _select(jnp.abs(v), count, left, s)
        return (update(v, kept), kept), None

    start = (w, jnp.ones(w.shape, bool))
    (v, kept), _ = jax.lax.scan(select_and_update, start, _shares_left(s))
    rest = s.iterations - s.selections
    v = jax.lax.fori_loop(0, rest, lambda _, v: update(v, kept), v)
    return jnp.where(kept, v, 0.0), kept


def solve_linear(
    w: jax.Array, system: System, residual: Residual | None, count: jax.Array, s: Settings
) -> Pruned:
    """Prune one linear.

    Source: Boža 2024, gradual pruning; the residual is ours.

    Args:
      w: W [out in]; worked on in float32.
      system: System of its inputs.
      residual: What W leaves of the target; None where the target is the dense output.
      count: Entries to remove, as `Pattern.counts` gives them.
      s: Settings.
    """
    chex.assert_shape(w, (None, len(system.norms)))
    # Differences decide masks, and TPUs' bfloat16 passes are too coarse for them.
    with jax.default_matmul_precision("highest"), jax.named_scope("admm"):
        dense = w.astype(jnp.float32) * system.norms[None, :]
        dense_h = dense @ system.h
        cross, square = jnp.zeros_like(dense), jnp.zeros(())
        if residual is not None:
            cross, square = residual.cross / system.norms[None, :], residual.square
        z, kept = _rounds(dense, dense_h + cross, system.inverse, count, s)
        # |X change^T - R|^2 and |X W^T + R|^2, from sums over tokens alone.
        change = z - dense
        change_h = change @ system.h - system.ridge * change
        error = jnp.sum(change * (change_h - 2 * cross)) + square
        target = jnp.sum(dense * (dense_h - system.ridge * dense + 2 * cross)) + square
    new = jnp.where(kept, z / system.norms[None, :], 0.0).astype(w.dtype)
    return Pruned(new, kept, error / jnp.maximum(target, jnp.finfo(jnp.float32).tiny))


def solve(
    ws: Sequence[jax.Array], system: System, counts: Sequence[jax.Array], s: Settings
) -> list[tuple[jax.Array, Mask]]:
    """Prune linears that read the same inputs toward their dense outputs, as `Pruner.solve` says.

    Args:
      ws: Matrices [out in].
      system: System of their inputs.
      counts: Entries to remove from each.
      s: Settings.

    Returns:
      W [out in] and kept, bool [out in], of each.
    """
    pruned = [solve_linear(w, system, None, n, s) for w, n in zip(ws, counts, strict=True)]
    return [(p.w, p.kept) for p in pruned]
