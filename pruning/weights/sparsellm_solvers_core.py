"""Solvers of linears inside SparseLLM's alternation: SparseGPT, and ADMM.

Each fits matrices that read the same inputs to what their outputs should be, and prunes them. H is
the scaled sum of x x^T over the inputs, and R what the outputs lack.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from pruning.weights import admm_core as admm
from pruning.weights import sparsegpt_core as sparsegpt
from pruning.weights.patterns_core import Pattern


class Solver(NamedTuple):
    """A solver; hashable, a static argument.

    Attributes:
      prepare: H [in in] -> (what `prune` needs of it, damping that H needed, float32 []).
      prune: (matrices [out in]; R X^T [out in] of each in H's scale, or None where their own
        outputs are wanted; prepared H; entries to remove from each) -> pruned matrices.
    """

    prepare: Callable[[jax.Array], tuple[Any, jax.Array]]
    prune: Callable[
        [Sequence[jax.Array], Sequence[jax.Array] | None, Any, Sequence[jax.Array]],
        list[jax.Array],
    ]


class Factors(NamedTuple):
    """Factors of H for SparseGPT.

    Attributes:
      prune: Factor to prune with.
      fit: Factor to fit with, damped more.
    """

    prune: sparsegpt.Factor
    fit: sparsegpt.Factor


def ridge_step(w: jax.Array, residual: jax.Array, f: sparsegpt.Factor) -> jax.Array:
    """Return the ridge solution that starts at W: W + R X^T H^-1.

    Args:
      w: W [out in].
      residual: R X^T in H's scale, [out in].
      f: Factor of H, damped as strongly as the solution should hold to W.

    Returns:
      The solution, [out in].
    """
    chex.assert_equal_shape([w, residual])
    # U^T U = H^-1, so two products with the triangle take the place of a solve.
    with jax.default_matmul_precision("highest"):
        return w + residual @ f.u.T @ f.u


def sparsegpt_pruned(
    ws: Sequence[jax.Array], f: sparsegpt.Factor, counts: Sequence[jax.Array], pattern: Pattern
) -> list[jax.Array]:
    """Prune matrices [out in] that read the same inputs by SparseGPT.

    Args:
      ws: The matrices.
      f: Factor of their inputs' H.
      counts: Entries to remove from each.
      pattern: Chooses them.
    """
    return [w for w, _ in sparsegpt.solve(ws, f, counts, pattern.keep, pattern.group)]


def _prepare_sparsegpt(h: jax.Array, damp: float, ridge: float) -> tuple[Factors, jax.Array]:
    factors = Factors(sparsegpt.factor(h, damp), sparsegpt.factor(h, ridge))
    return factors, factors.prune.damping


def _prune_by_sparsegpt(
    ws: Sequence[jax.Array],
    residuals: Sequence[jax.Array] | None,
    factors: Factors,
    counts: Sequence[jax.Array],
    pattern: Pattern,
) -> list[jax.Array]:
    if residuals is not None:
        ws = [ridge_step(w, r, factors.fit) for w, r in zip(ws, residuals, strict=True)]
    return sparsegpt_pruned(ws, factors.prune, counts, pattern)


def _prepare_admm(h: jax.Array, damp: float) -> tuple[admm.System, jax.Array]:
    return admm.prepare(h, damp), jnp.asarray(damp, jnp.float32)


def _prune_by_admm(
    ws: Sequence[jax.Array],
    residuals: Sequence[jax.Array] | None,
    system: admm.System,
    counts: Sequence[jax.Array],
    settings: admm.Settings,
) -> list[jax.Array]:
    pruned = []
    for k, (w, count) in enumerate(zip(ws, counts, strict=True)):
        # One solution fits and prunes; its error is not asked for.
        left = None if residuals is None else admm.Residual(residuals[k], jnp.zeros(()))
        pruned.append(admm.solve_linear(w, system, left, count, settings).w)
    return pruned


# Cached: equal arguments give one object, so one compilation.
@functools.cache
def by_sparsegpt(damp: float, ridge: float, pattern: Pattern) -> Solver:
    """Return SparseGPT, with a ridge fit before it.

    Args:
      damp: SparseGPT's damping, as a share of H's mean diagonal.
      ridge: Damping of the fit, likewise.
      pattern: Chooses the entries to remove.
    """
    return Solver(
        functools.partial(_prepare_sparsegpt, damp=damp, ridge=ridge),
        functools.partial(_prune_by_sparsegpt, pattern=pattern),
    )


@functools.cache
def by_admm(damp: float, settings: admm.Settings) -> Solver:
    """Return ADMM, which fits and prunes at once.

    Args:
      damp: Ridge toward the weights it starts from, as a share of the mean diagonal of inputs of
        norm 1.
      settings: Settings of its rounds.
    """
    return Solver(
        functools.partial(_prepare_admm, damp=damp),
        functools.partial(_prune_by_admm, settings=settings),
    )
