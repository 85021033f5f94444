"""SparseLLM (Bai et al. 2024), maths: alternate over auxiliary activations of a feed-forward part.

The paper's objective (eq. 4, and eq. 9 for a gated part), with tokens as rows here:

    beta |p W2^T + b2 - Y|^2 + gamma |p - act(s) z|^2
        + alpha |z - X W1^T - b1|^2 + alpha |s - X Wg^T - bg|^2

z is the output of the linear W1 (up, fc1), s that of its gate Wg, and p the input of W2 (down,
fc2). Without a gate the second term is gamma |p - act(z)|^2, and there is no s. X and Y are the
input and the output of the dense part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from calibration.observers import outer_products
from models.layers import ACTIVATIONS, Linear, linear
from pruning import linalg
from pruning.weights import sparsegpt_core as sparsegpt
from pruning.weights.patterns_core import Pattern

# [micro-batches b t d] in any type, one for each size b of micro-batches.
Stacks = Sequence[jax.Array]


class Ffn(NamedTuple):
    """Linears of a feed-forward part, float32.

    Attributes:
      w1: W1 [f d] and its bias.
      gate: Gate Wg [f d] and its bias; None without one.
      w2: W2 [d f] and its bias.
    """

    w1: Linear
    gate: Linear | None
    w2: Linear

    @property
    def writers(self) -> list[Linear]:
        """Return the linears that read X: W1 and its gate."""
        return [self.w1] if self.gate is None else [self.w1, self.gate]

    def with_writers(self, ws: Sequence[jax.Array]) -> "Ffn":
        """Return the part with other matrices [f d] in `writers`."""
        new = [Linear(w, p.b) for p, w in zip(self.writers, ws, strict=True)]
        return self._replace(w1=new[0], gate=new[1] if self.gate is not None else None)

    def with_w2(self, w: jax.Array) -> "Ffn":
        """Return the part with another W2 [d f]."""
        return self._replace(w2=Linear(w, self.w2.b))


class Counts(NamedTuple):
    """Entries to remove, as `sparsegpt.solve` takes them.

    Attributes:
      writers: Counts of W1 and its gate.
      w2: Count of W2.
    """

    writers: tuple[jax.Array, ...]
    w2: jax.Array


class Penalties(NamedTuple):
    """Weights of the objective's terms.

    Attributes:
      alpha: Weight of the terms of z and s.
      beta: Weight of the term of the output.
      gamma: Weight of the term of p.
    """

    alpha: float
    beta: float
    gamma: float


class Settings(NamedTuple):
    """Settings of an alternation; hashable, a static argument.

    Attributes:
      act: Name of the activation.
      pattern: Chooses the entries to remove.
      damp: SparseGPT's damping, as a share of H's mean diagonal.
      ridge: Damping of the fits of `solve_corrected`, likewise.
      penalties: Weights of the objective's terms.
      iterations: Iterations, at least 1.
    """

    act: str
    pattern: Pattern
    damp: float
    ridge: float
    penalties: Penalties
    iterations: int


class Solution(NamedTuple):
    """Result of an alternation.

    Attributes:
      ffn: The pruned part.
      losses: Mean squared error against Y of each iteration, float32 [iterations].
      damping: The most damping that a factor needed, float32 [].
    """

    ffn: Ffn
    losses: jax.Array
    damping: jax.Array


def hidden(z: jax.Array, s: jax.Array | None, act: str) -> jax.Array:
    """Return act(z), or act(s) z with a gate, [... f]."""
    return ACTIVATIONS[act](z) if s is None else ACTIVATIONS[act](s) * z


def hidden_input(ffn: Ffn, x: jax.Array, act: str) -> jax.Array:
    """Return the input of W2 [... f] for the part's input x [... d]."""
    return hidden(linear(ffn.w1, x), None if ffn.gate is None else linear(ffn.gate, x), act)


def squared_error(ffn: Ffn, x: jax.Array, y: jax.Array, act: str) -> jax.Array:
    """Return the sum of squared differences between the part's output and y, [].

    Args:
      ffn: The part.
      x: Its input, [... d].
      y: Wanted output, [... d].
      act: Name of the activation.
    """
    return jnp.sum((linear(ffn.w2, hidden_input(ffn, x, act)) - y) ** 2)


def p_gain(w2: Linear, c: Penalties) -> jax.Array:
    """Compute the gain that maps the output residual to the update of p.

    W2^T (W2 W2^T + gamma/beta I)^-1.

    Args:
      w2: W2 [d f].
      c: Weights of the terms.

    Returns:
      The gain, [f d].
    """
    w = w2.w
    chex.assert_rank(w, 2)
    a = w @ w.T + (c.gamma / c.beta) * jnp.eye(len(w))
    return linalg.solve(a, w).T


def p_step(w2: Linear, gain: jax.Array, y: jax.Array, h: jax.Array) -> jax.Array:
    """Return the p that minimises the objective. Source: Bai et al. 2024, eq. 8.

    Args:
      w2: W2 [d f].
      gain: `p_gain` of it, [f d].
      y: Wanted output, [... d].
      h: act(s) z, [... f].

    Returns:
      p [... f].
    """
    chex.assert_equal_shape_prefix([y, h], y.ndim - 1)
    # The paper's (beta W2^T W2 + gamma I)^-1 (beta W2^T (Y - b2) + gamma h), by the matrix
    # inversion lemma: h and a correction, with a d x d system in place of an f x f one.
    return h + (y - linear(w2, h)) @ gain.T


def z_relu(m: jax.Array, p: jax.Array, c: Penalties) -> jax.Array:
    """Return the z that minimises gamma (p - relu(z))^2 + alpha (z - m)^2, entry by entry.

    Source: Bai et al. 2024, eq. 7.

    Args:
      m: Output of W1, [... f].
      p: Input of W2, [... f].
      c: Weights of the terms.
    """
    chex.assert_equal_shape([m, p])
    # The objective has one minimum where relu is on and one where it is off.
    on = jnp.maximum(0, (c.gamma * p + c.alpha * m) / (c.gamma + c.alpha))
    off = jnp.minimum(0, m)

    def cost(z: jax.Array) -> jax.Array:
        return c.gamma * (p - jax.nn.relu(z)) ** 2 + c.alpha * (z - m) ** 2

    return jnp.where(cost(on) <= cost(off), on, off)


def z_gated(m: jax.Array, p: jax.Array, g: jax.Array, c: Penalties) -> jax.Array:
    """Return the z that minimises gamma (p - g z)^2 + alpha (z - m)^2, entry by entry.

    Source: Bai et al. 2024, eq. 10.

    Args:
      m: Output of W1, [... f].
      p: Input of W2, [... f].
      g: act(s), [... f].
      c: Weights of the terms.
    """
    chex.assert_equal_shape([m, p, g])
    return (c.alpha * m + c.gamma * g * p) / (c.alpha + c.gamma * g**2)


def s_gated(
    m: jax.Array, z: jax.Array, s: jax.Array, p: jax.Array, act: str, c: Penalties
) -> jax.Array:
    """Take one Gauss-Newton step from s on alpha (s - m)^2 + gamma (p - act(s) z)^2.

    Args:
      m: Output of the gate, [... f].
      z: z, [... f].
      s: s to start from, [... f].
      p: Input of W2, [... f].
      act: Name of the activation.
      c: Weights of the terms.

    Returns:
      s [... f]; entries that would raise the objective stay.
    """
    chex.assert_equal_shape([m, z, s, p])

    def cost(s: jax.Array) -> jax.Array:
        return c.alpha * (s - m) ** 2 + c.gamma * (p - ACTIVATIONS[act](s) * z) ** 2

    # Unlike the official step of fixed rate, this one is stable however large z is.
    g, slope = jax.jvp(ACTIVATIONS[act], (s,), (jnp.ones_like(s),))
    slope = slope * z
    new = s - (c.alpha * (s - m) - c.gamma * slope * (p - g * z)) / (c.alpha + c.gamma * slope**2)
    return jnp.where(cost(new) < cost(s), new, s)


def residuals_and_error(
    ffn: Ffn, gain: jax.Array, x: jax.Array, y: jax.Array, act: str, c: Penalties
) -> tuple[list[jax.Array], jax.Array]:
    """Update p, z and s once, starting at the part's own activations.

    Args:
      ffn: The part.
      gain: `p_gain` of its W2, [f d].
      x: Its input, [... d].
      y: Wanted output, [... d].
      act: Name of the activation.
      c: Weights of the terms.

    Returns:
      New z and s less the outputs of the writers, [... f] each, and the sum of squared errors of
      the part before the update, [].
    """
    m = [linear(w, x) for w in ffn.writers]
    z, s = m[0], m[1] if ffn.gate is not None else None
    h = hidden(z, s, act)
    p = p_step(ffn.w2, gain, y, h)
    error = jnp.sum((linear(ffn.w2, h) - y) ** 2)
    if s is None:
        return [z_relu(m[0], p, c) - m[0]], error
    z = z_gated(m[0], p, ACTIVATIONS[act](s), c)
    return [z - m[0], s_gated(m[1], z, s, p, act, c) - m[1]], error


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
    return w + residual @ f.u.T @ f.u


class _Best(NamedTuple):
    """The part of least error so far, and its sum of squared errors []."""

    ffn: Ffn
    loss: jax.Array


def _keep_best(best: _Best, ffn: Ffn, loss: jax.Array) -> _Best:
    """Return the part of lower error."""
    return jax.tree.map(lambda a, b: jnp.where(loss < best.loss, b, a), best, _Best(ffn, loss))


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


def _prune_with_sparsegpt(
    dense: Ffn, x: Stacks, counts: Counts, scale: float, c: Settings
) -> tuple[Ffn, jax.Array, sparsegpt.Factor, jax.Array]:
    """Return SparseGPT's part, H of X, its factor, and the damping of both factors [2]."""

    def grams(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = hidden_input(dense, x, c.act)
        return outer_products(x), outer_products(h)

    h1, h2 = (scale * h for h in _sum_over_batches(grams, x))
    f1, f2 = (sparsegpt.factor(h, c.damp) for h in (h1, h2))
    writers = sparsegpt_pruned([p.w for p in dense.writers], f1, counts.writers, c.pattern)
    (w2,) = sparsegpt_pruned([dense.w2.w], f2, [counts.w2], c.pattern)
    ffn = dense.with_writers(writers).with_w2(w2)
    return ffn, h1, f1, jnp.stack([f1.damping, f2.damping])


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

    def w2_sums(ffn: Ffn, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = hidden_input(ffn, x, c.act)
        wanted = y if dense.w2.b is None else y - dense.w2.b[None, None]
        return outer_products(h), _outer_sum(wanted, h)

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
            h2, wanted = _sum_over_batches(functools.partial(w2_sums, ffn), x, y)
            # R X^T of y less the output of the dense W2, whose sums H holds already.
            residual = wanted - dense.w2.w @ h2
            f2, fit2 = (sparsegpt.factor(scale * h2, share) for share in (c.damp, c.ridge))
            fitted = [ridge_step(dense.w2.w, scale * residual, fit2)]
            ffn = ffn.with_w2(sparsegpt_pruned(fitted, f2, [counts.w2], c.pattern)[0])
        return (ffn, best), (error, f2.damping)

    with jax.default_matmul_precision("highest"):
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
