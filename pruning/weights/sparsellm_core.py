"""SparseLLM (Bai et al. 2024): the feed-forward part of a block pruned as a whole, by alternating over its auxiliary activations.

Maths only. The paper's objective (eq. 4, and eq. 9 for a gated part), tokens as rows here:

    beta |p W2^T + b2 - Y|^2 + gamma |p - act(s) z|^2 + alpha |z - X W1^T - b1|^2 + alpha |s - X Wg^T - bg|^2

z stands for what leaves the linear W1 (up, fc1), s for what leaves its gate Wg, p for what enters W2 (down, fc2). Without a gate the
second term is gamma |p - act(z)|^2 and there is no s. X and Y are what entered and left the dense part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calibration.observers import outer_products
from models.layers import ACTIVATIONS, Linear, linear
from pruning import linalg as inverse
from pruning.types import Pattern
from pruning.weights import sparsegpt_core as sparsegpt

Stacks = Sequence[
    jax.Array
]  # [micro-batches b t d] in any type, one for each size b of micro-batches


class Ffn(NamedTuple):
    """The linears of a feed-forward part, float32: W1 [f d], its gate Wg [f d] or None, W2 [d f], with their biases."""

    w1: Linear
    gate: Linear | None
    w2: Linear

    @property
    def writers(self) -> list[Linear]:
        """Those that read X."""
        return [self.w1] if self.gate is None else [self.w1, self.gate]

    def with_writers(self, ws: Sequence[jax.Array]) -> "Ffn":
        """New matrices for `writers`."""
        w1, *gate = (Linear(w, p.b) for p, w in zip(self.writers, ws, strict=True))
        return self._replace(w1=w1, gate=gate[0] if gate else None)

    def with_w2(self, w: jax.Array) -> "Ffn":
        """A new W2."""
        return self._replace(w2=Linear(w, self.w2.b))


class Counts(NamedTuple):
    """What is to go, as `sparsegpt.solve` takes it: of the `writers`, one each, and of W2."""

    writers: tuple[jax.Array, ...]
    w2: jax.Array


class Penalties(NamedTuple):
    """The weights of the objective's terms."""

    alpha: float
    beta: float
    gamma: float


class Settings(NamedTuple):
    """What an alternation depends on besides arrays; hashable, a static argument.

    act: the activation's name; rule: which entries go; damp: SparseGPT's, as a share of H's mean diagonal; ridge: `solve_corrected`'s, likewise,
    added to H where weights are fitted; iterations: >= 1.
    """

    act: str
    rule: Pattern
    damp: float
    ridge: float
    penalties: Penalties
    iterations: int


class Solved(NamedTuple):
    """ffn: the pruned part; losses: each iteration's mean squared error against Y, float32 [iterations]; damping: the most that a factor
    needed, float32 []."""

    ffn: Ffn
    losses: jax.Array
    damping: jax.Array


def hidden(z: jax.Array, s: jax.Array | None, act: str) -> jax.Array:
    """act(z), or act(s) z with a gate."""
    return ACTIVATIONS[act](z) if s is None else ACTIVATIONS[act](s) * z


def inside(ffn: Ffn, x: jax.Array, act: str) -> jax.Array:
    """What the part gives its W2 for x [... d], [... f]."""
    return hidden(linear(ffn.w1, x), None if ffn.gate is None else linear(ffn.gate, x), act)


def squared_error(ffn: Ffn, x: jax.Array, y: jax.Array, act: str) -> jax.Array:
    """Sum of squares of what the part gives for x [... d] less y [... d], []."""
    return jnp.sum((linear(ffn.w2, inside(ffn, x, act)) - y) ** 2)


def p_gain(w2: Linear, c: Penalties) -> jax.Array:
    """W2^T (W2 W2^T + gamma/beta I)^-1 [f d]: how p follows what the part's output lacks."""
    w = w2.w
    a = w @ w.T + (c.gamma / c.beta) * jnp.eye(len(w))
    return inverse.solve(a, w).T


def p_step(w2: Linear, gain: jax.Array, y: jax.Array, h: jax.Array) -> jax.Array:
    """The p that minimises the objective (eq. 8) for h = act(s) z, [... f].

    The paper's (beta W2^T W2 + gamma I)^-1 (beta W2^T (Y - b2) + gamma h), by the matrix inversion lemma: h and a correction, with a
    d x d system in place of an f x f one.
    """
    return h + (y - linear(w2, h)) @ gain.T


def z_relu(m: jax.Array, p: jax.Array, c: Penalties) -> jax.Array:
    """The better of the two minima of gamma (p - relu(z))^2 + alpha (z - m)^2 (eq. 7): one where relu is on, one where it is off."""
    on = jnp.maximum(0, (c.gamma * p + c.alpha * m) / (c.gamma + c.alpha))
    off = jnp.minimum(0, m)

    def cost(z: jax.Array) -> jax.Array:
        return c.gamma * (p - jax.nn.relu(z)) ** 2 + c.alpha * (z - m) ** 2

    return jnp.where(cost(on) <= cost(off), on, off)


def z_gated(m: jax.Array, p: jax.Array, g: jax.Array, c: Penalties) -> jax.Array:
    """The minimum of gamma (p - g z)^2 + alpha (z - m)^2, g = act(s) (eq. 10)."""
    return (c.alpha * m + c.gamma * g * p) / (c.alpha + c.gamma * g**2)


def s_gated(
    m: jax.Array, z: jax.Array, s: jax.Array, p: jax.Array, act: str, c: Penalties
) -> jax.Array:
    """One Gauss-Newton step from s on alpha (s - m)^2 + gamma (p - act(s) z)^2, for every entry on its own; where it does not lower
    the objective, s stays. Unlike a step of fixed rate it is stable however large z is."""

    def cost(s: jax.Array) -> jax.Array:
        return c.alpha * (s - m) ** 2 + c.gamma * (p - ACTIVATIONS[act](s) * z) ** 2

    g, slope = jax.jvp(ACTIVATIONS[act], (s,), (jnp.ones_like(s),))
    slope = slope * z
    new = s - (c.alpha * (s - m) - c.gamma * slope * (p - g * z)) / (c.alpha + c.gamma * slope**2)
    return jnp.where(cost(new) < cost(s), new, s)


def aimed(
    ffn: Ffn, gain: jax.Array, x: jax.Array, y: jax.Array, act: str, c: Penalties
) -> tuple[list[jax.Array], jax.Array]:
    """One round over p, z and s from where the part's own activations are: (z and s less what the writers give [... f] each, sum of
    squared errors of the part as it is [])."""
    m = [linear(w, x) for w in ffn.writers]
    z, s = m[0], m[1] if ffn.gate is not None else None
    h = hidden(z, s, act)
    p = p_step(ffn.w2, gain, y, h)
    error = jnp.sum((linear(ffn.w2, h) - y) ** 2)
    if s is None:
        return [z_relu(m[0], p, c) - m[0]], error
    z = z_gated(m[0], p, ACTIVATIONS[act](s), c)
    return [z - m[0], s_gated(m[1], z, s, p, act, c) - m[1]], error


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over tokens of a b^T, [a b]."""
    return jnp.einsum("btf,btd->fd", a, b)


def _total(f: Callable[..., Any], *xs: Stacks) -> Any:
    """The sum of f over micro-batches [b t d], in float32: what f makes of them exists for one of them at a time."""

    def of(x: tuple[jax.Array, ...]) -> Any:
        return f(*(part.astype(jnp.float32) for part in x))

    def add(total: Any, x: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(x)), None

    total = jax.tree.map(
        lambda o: jnp.zeros(o.shape, o.dtype), jax.eval_shape(of, tuple(x[0][0] for x in xs))
    )
    for stacks in zip(*xs, strict=True):
        total, _ = jax.lax.scan(add, total, stacks)
    return total


def _toward(w: jax.Array, residual: jax.Array, f: sparsegpt.Factor) -> jax.Array:
    """The ridge solution that starts at W: W + R X^T H^-1 [out in].

    Args:
      residual: R X^T [out in] in H's scale; f: H's factor, damped as strongly as the solution should hold to W.
    """
    return w + residual @ f.u.T @ f.u


class _Best(NamedTuple):
    ffn: Ffn
    loss: jax.Array


def _better(best: _Best, ffn: Ffn, loss: jax.Array) -> _Best:
    return jax.tree.map(lambda a, b: jnp.where(loss < best.loss, b, a), best, _Best(ffn, loss))


def pruned(
    ws: Sequence[jax.Array], f: sparsegpt.Factor, counts: Sequence[jax.Array], rule: Pattern
) -> list[jax.Array]:
    """SparseGPT of matrices [out in] that read the same inputs."""
    return [w for w, _ in sparsegpt.solve(ws, f, counts, rule.keep, rule.group)]


def _start(
    dense: Ffn, x: Stacks, counts: Counts, scale: float, c: Settings
) -> tuple[Ffn, jax.Array, sparsegpt.Factor, jax.Array]:
    """SparseGPT's part, X's H, its factor, and the damping of both factors [2]."""

    def grams(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = inside(dense, x, c.act)
        return outer_products(x), outer_products(h)

    h1, h2 = (scale * h for h in _total(grams, x))
    f1, f2 = (sparsegpt.factor(h, c.damp) for h in (h1, h2))
    ffn = dense.with_writers(pruned([p.w for p in dense.writers], f1, counts.writers, c.rule))
    return (
        ffn.with_w2(pruned([dense.w2.w], f2, [counts.w2], c.rule)[0]),
        h1,
        f1,
        jnp.stack([f1.damping, f2.damping]),
    )


def solve_corrected(dense: Ffn, x: Stacks, y: Stacks, counts: Counts, c: Settings) -> Solved:
    """The alternation made sound: sums over tokens and Cholesky factors in place of pseudo-inverses.

    Iteration 0 is SparseGPT. Each further one sets p, z and s from the pruned part's own activations, fits W1 and Wg to z and s and
    prunes them, then fits W2 to y from what these now give (p as the constraint has it) and prunes it. The iteration of least error is
    kept, so the part is never worse than SparseGPT's on these tokens.

    Args:
      x: what enters the part; sums over it are float32.
      y: what should leave it, likewise.
    """
    scale = 2.0 / sum(part.shape[0] * part.shape[1] for part in x)  # H's

    def reading(ffn: Ffn, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = inside(ffn, x, c.act)
        return outer_products(h), _outer(y if dense.w2.b is None else y - dense.w2.b[None, None], h)

    def iterate(
        carry: tuple[Ffn, _Best], _: None
    ) -> tuple[tuple[Ffn, _Best], tuple[jax.Array, jax.Array]]:
        ffn, best = carry
        gain = p_gain(ffn.w2, c.penalties)

        def aims(x: jax.Array, y: jax.Array) -> tuple[list[jax.Array], jax.Array]:
            residuals, error = aimed(ffn, gain, x, y, c.act, c.penalties)
            return [_outer(r, x) for r in residuals], error

        residuals, error = _total(aims, x, y)
        best = _better(best, ffn, error)
        fitted = [
            _toward(p.w, scale * r, fit1) for p, r in zip(ffn.writers, residuals, strict=True)
        ]
        ffn = ffn.with_writers(pruned(fitted, f1, counts.writers, c.rule))
        h2, wanted = _total(functools.partial(reading, ffn), x, y)
        residual = (
            wanted - dense.w2.w @ h2
        )  # of y less what the dense W2 gives h, which H holds already
        f2, fit2 = (sparsegpt.factor(scale * h2, share) for share in (c.damp, c.ridge))
        ffn = ffn.with_w2(
            pruned([_toward(dense.w2.w, scale * residual, fit2)], f2, [counts.w2], c.rule)[0]
        )
        return (ffn, best), (error, f2.damping)

    with jax.default_matmul_precision("highest"):
        ffn, h1, f1, damping = _start(dense, x, counts, scale, c)
        fit1 = sparsegpt.factor(h1, c.ridge)
        start = (ffn, _Best(ffn, jnp.asarray(jnp.inf)))
        (ffn, best), (errors, dampings) = jax.lax.scan(iterate, start, None, c.iterations - 1)
        last = _total(functools.partial(squared_error, ffn, act=c.act), x, y)
        best = _better(best, ffn, last)
        return Solved(
            best.ffn,
            jnp.append(errors, last) / float(sum(part.size for part in y)),
            jnp.max(jnp.append(damping, dampings)),
        )
