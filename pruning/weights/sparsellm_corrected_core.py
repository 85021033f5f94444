"""SparseLLM (Bai et al. 2024), corrected maths: sums over tokens in place of all activations.

The letters are those of `pruning.weights.sparsellm_core`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from calibration.observers import outer_products
from models.precision import float32_products, product
from pruning.weights.sparsellm_core import (
    Counts,
    Ffn,
    Settings,
    Solution,
    hidden_input,
    p_gain,
    residuals_and_error,
    squared_error,
)

# [micro-batches b t d] in any type, one for each size b of micro-batches.
Stacks = Sequence[jax.Array]


def _outer_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sum over tokens of a b^T, [a b]."""
    return product("btf,btd->fd", a, b, precision="highest")


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


class _Best(NamedTuple):
    """The part of least error so far, and its sum of squared errors []."""

    ffn: Ffn
    loss: jax.Array


def _keep_best(best: _Best, ffn: Ffn, loss: jax.Array) -> _Best:
    """Return the part of lower error."""
    # NaN is never lower, so an iteration that overflows is passed over.
    return jax.tree.map(lambda a, b: jnp.where(loss < best.loss, b, a), best, _Best(ffn, loss))


def _prune_toward_own_outputs(
    dense: Ffn, x: Stacks, counts: Counts, scale: float, c: Settings
) -> tuple[Ffn, Any, jax.Array]:
    """Return the solver's own part, X's H as prepared, and the damping of both H [2]."""

    def grams(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = hidden_input(dense, x, c.act)
        sums: tuple[jax.Array, jax.Array] = c.split((outer_products(x), outer_products(h)))
        return sums

    h1, h2 = (scale * h for h in _sum_over_batches(grams, x))
    (prepared1, damping1), (prepared2, damping2) = (c.solver.prepare(h) for h in (h1, h2))
    writers = c.solver.prune([p.w for p in dense.writers], None, prepared1, counts.writers)
    (w2,) = c.solver.prune([dense.w2.w], None, prepared2, [counts.w2])
    ffn = dense.with_writers(writers).with_w2(w2)
    return ffn, prepared1, jnp.stack([damping1, damping2])


def _w2_sums(
    ffn: Ffn, b2: jax.Array | None, c: Settings, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sums that W2 is fitted by: h h^T [f f], and (y - b2) h^T [d f]."""
    h = hidden_input(ffn, x, c.act)
    wanted = y if b2 is None else y - b2[None, None]
    # Split, as [f f] is the largest array of all.
    sums: tuple[jax.Array, jax.Array] = c.split((outer_products(h), _outer_sum(wanted, h)))
    return sums


def solve_corrected(dense: Ffn, x: Stacks, y: Stacks, counts: Counts, c: Settings) -> Solution:
    """Prune a feed-forward part with sums over tokens.

    Iteration 0 is the solver alone, by default SparseGPT. Each further one sets p, z and s from the
    pruned part's own activations, fits W1 and Wg to z and s and prunes them, then fits W2 to y from
    the outputs of these (p as the constraint has it) and prunes it. The iteration of least error is
    kept, so the part is never worse than the solver's own on these tokens.

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
            scaled = [scale * r for r in residuals]
            matrices = [p.w for p in ffn.writers]
            ffn = ffn.with_writers(c.solver.prune(matrices, scaled, prepared1, counts.writers))
        with jax.named_scope("fit_w2"):
            h2, wanted = _sum_over_batches(functools.partial(_w2_sums, ffn, dense.w2.b, c), x, y)
            # R X^T of y less the output of the dense W2, whose sums H holds already.
            with jax.default_matmul_precision("highest"):
                residual = wanted - dense.w2.w @ h2
            prepared2, damping2 = c.solver.prepare(scale * h2)
            (w2,) = c.solver.prune([dense.w2.w], [scale * residual], prepared2, [counts.w2])
            ffn = ffn.with_w2(w2)
        return (ffn, best), (error, damping2)

    with float32_products():
        with jax.named_scope("solver_alone"):
            # X stays the same, so H is prepared once for all iterations.
            ffn, prepared1, damping = _prune_toward_own_outputs(dense, x, counts, scale, c)
        start = (ffn, _Best(ffn, jnp.asarray(jnp.inf)))
        (ffn, best), (errors, dampings) = jax.lax.scan(iterate, start, None, c.iterations - 1)
        last = _sum_over_batches(functools.partial(squared_error, ffn, act=c.act), x, y)
        best = _keep_best(best, ffn, last)
        losses = jnp.append(errors, last) / float(sum(part.size for part in y))
        return Solution(best.ffn, losses, jnp.max(jnp.append(damping, dampings)))
