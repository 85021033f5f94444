"""SparseLLM (Bai et al. 2024), corrected maths: sums over tokens and Cholesky factors.

The letters are those of `pruning.weights.sparsellm_core`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from calibration.observers import outer_products
from pruning.weights import sparsegpt_core as sparsegpt
from pruning.weights.sparsellm_core import (
    Counts,
    Ffn,
    Settings,
    Solution,
    hidden_input,
    p_gain,
    residuals_and_error,
    sparsegpt_pruned,
    squared_error,
)

# [micro-batches b t d] in any type, one for each size b of micro-batches.
Stacks = Sequence[jax.Array]


def _outer_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sum over tokens of a b^T, [a b]."""
    return jnp.einsum("btf,btd->fd", a, b)


def _sum_over_batches(f: Callable[..., Any], *xs: Stacks) -> Any:
    """Return the sum of f over micro-batches [b t d], read in float32."""

    def of_batch(x: tuple[jax.Array, ...]) -> Any:
        return f(*(part.astype(jnp.float32) for part in x))

    def add(total: Any, x: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_batch(x)), None

    # A scan, so that the activations of only one micro-batch exist at a time.
    shapes = jax.eval_shape(of_batch, tuple(x[0][0] for x in xs))
    total = jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), shapes)
    for stacks in zip(*xs, strict=True):
        total, _ = jax.lax.scan(add, total, stacks)
    return total


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
    return w + residual @ f.u.T @ f.u


class _Best(NamedTuple):
    """The part of least error so far, and its sum of squared errors []."""

    ffn: Ffn
    loss: jax.Array


def _keep_best(best: _Best, ffn: Ffn, loss: jax.Array) -> _Best:
    """Return the part of lower error."""
    # NaN is never lower, so an iteration that overflows is passed over.
    return jax.tree.map(lambda a, b: jnp.where(loss < best.loss, b, a), best, _Best(ffn, loss))


def _prune_with_sparsegpt(
    dense: Ffn, x: Stacks, counts: Counts, scale: float, c: Settings
) -> tuple[Ffn, jax.Array, sparsegpt.Factor, jax.Array]:
    """Return SparseGPT's part, H of X, its factor, and the damping of both factors [2]."""

    def grams(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = hidden_input(dense, x, c.act)
        return outer_products(x), outer_products(h)

    h1, h2 = (scale * h for h in _sum_over_batches(grams, x))
    # SparseGPT's own damping: iteration 0 is SparseGPT. The ridge serves the fits alone.
    f1, f2 = (sparsegpt.factor(h, c.damp) for h in (h1, h2))
    writers = sparsegpt_pruned([p.w for p in dense.writers], f1, counts.writers, c.pattern)
    (w2,) = sparsegpt_pruned([dense.w2.w], f2, [counts.w2], c.pattern)
    ffn = dense.with_writers(writers).with_w2(w2)
    return ffn, h1, f1, jnp.stack([f1.damping, f2.damping])


def _w2_sums(
    ffn: Ffn, b2: jax.Array | None, act: str, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sums that W2 is fitted by: h h^T [f f], and (y - b2) h^T [d f]."""
    h = hidden_input(ffn, x, act)
    wanted = y if b2 is None else y - b2[None, None]
    return outer_products(h), _outer_sum(wanted, h)


def solve_corrected(dense: Ffn, x: Stacks, y: Stacks, counts: Counts, c: Settings) -> Solution:
    """Prune a feed-forward part with sums over tokens and Cholesky factors.

    Iteration 0 is SparseGPT. Each further one sets p, z and s from the pruned part's own
    activations, fits W1 and Wg to z and s and prunes them, then fits W2 to y from the outputs of
    these (p as the constraint has it) and prunes it. The iteration of least error is kept, so the
    part is never worse than SparseGPT's on these tokens.

    Args:
      dense: The dense part.
      x: Its inputs.
      y: Wanted outputs.
      counts: Entries to remove.
      c: Settings.
    """
    chex.assert_rank([*x, *y], 4)
    chex.assert_rank([p.w for p in (*dense.writers, dense.w2)], 2)
    chex.assert_type([p.w for p in (*dense.writers, dense.w2)], jnp.float32)
    # H = 2/n X X^T, here over n tokens: damping is relative, so only dead inputs can tell.
    scale = 2.0 / sum(part.shape[0] * part.shape[1] for part in x)

    def iterate(
        carry: tuple[Ffn, _Best], _: None
    ) -> tuple[tuple[Ffn, _Best], tuple[jax.Array, jax.Array]]:
        ffn, best = carry
        with jax.named_scope("update_p"):
            gain = p_gain(ffn.w2, c.penalties)

        def residual_sums(x: jax.Array, y: jax.Array) -> tuple[list[jax.Array], jax.Array]:
            residuals, error = residuals_and_error(ffn, gain, x, y, c.act, c.penalties)
            return [_outer_sum(r, x) for r in residuals], error

        with jax.named_scope("update_z_and_s"):
            residuals, error = _sum_over_batches(residual_sums, x, y)
        best = _keep_best(best, ffn, error)
        with jax.named_scope("fit_w1"):
            fitted = [
                ridge_step(p.w, scale * r, fit1)
                for p, r in zip(ffn.writers, residuals, strict=True)
            ]
            ffn = ffn.with_writers(sparsegpt_pruned(fitted, f1, counts.writers, c.pattern))
        with jax.named_scope("fit_w2"):
            h2, wanted = _sum_over_batches(
                functools.partial(_w2_sums, ffn, dense.w2.b, c.act), x, y
            )
            # R X^T of y less the output of the dense W2, whose sums H holds already.
            residual = wanted - dense.w2.w @ h2
            f2, fit2 = (sparsegpt.factor(scale * h2, share) for share in (c.damp, c.ridge))
            fitted = [ridge_step(dense.w2.w, scale * residual, fit2)]
            ffn = ffn.with_w2(sparsegpt_pruned(fitted, f2, [counts.w2], c.pattern)[0])
        return (ffn, best), (error, f2.damping)

    with jax.default_matmul_precision("highest"):  # TPUs' bfloat16 passes are too coarse for H
        with jax.named_scope("sparsegpt"):
            ffn, h1, f1, damping = _prune_with_sparsegpt(dense, x, counts, scale, c)
        # X stays the same, so one factor serves the fits of all iterations.
        fit1 = sparsegpt.factor(h1, c.ridge)
        start = (ffn, _Best(ffn, jnp.asarray(jnp.inf)))
        (ffn, best), (errors, dampings) = jax.lax.scan(iterate, start, None, c.iterations - 1)
        last = _sum_over_batches(functools.partial(squared_error, ffn, act=c.act), x, y)
        best = _keep_best(best, ffn, last)
        losses = jnp.append(errors, last) / float(sum(part.size for part in y))
        return Solution(best.ffn, losses, jnp.max(jnp.append(damping, dampings)))
