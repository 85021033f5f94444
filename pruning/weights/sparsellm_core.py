"""SparseLLM (Bai et al. 2024), maths: alternate over auxiliary activations of a feed-forward part.

The paper's objective (eq. 4, and eq. 9 for a gated part), with tokens as rows here:

    beta |p W2^T + b2 - Y|^2 + gamma |p - act(s) z|^2
        + alpha |z - X W1^T - b1|^2 + alpha |s - X Wg^T - bg|^2

z is the output of the linear W1 (up, fc1), s that of its gate Wg, and p the input of W2 (down,
fc2). Without a gate the second term is gamma |p - act(z)|^2, and there is no s. X and Y are the
input and the output of the dense part.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from models.layers import ACTIVATIONS, Linear, linear
from pruning import linalg
from pruning.weights.patterns_core import Pattern
from pruning.weights.sparsellm_solvers_core import Solver


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
    """Entries to remove, as `Pattern.counts` gives them.

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


def as_is(matrices: Any) -> Any:
    """Return matrices as they are, where there is one device."""
    return matrices


class Settings(NamedTuple):
    """Settings of an alternation; hashable, a static argument.

    Attributes:
      act: Name of the activation.
      pattern: Chooses the entries to remove.
      damp: SparseGPT's damping in the official alternation, as a share of H's mean diagonal.
      solver: Solver of linears in the corrected alternation.
      penalties: Weights of the objective's terms.
      iterations: Iterations, at least 1.
      split: Spreads the rows of matrices over the devices, of which there may be one.
    """

    act: str
    pattern: Pattern
    damp: float
    solver: Solver
    penalties: Penalties
    iterations: int
    split: Callable[[Any], Any] = as_is


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
    # d x d, where the paper's system is f x f and f is about 3 d in LLaMA. gamma / beta > 0 keeps
    # it positive definite, also where pruning has cost W2 its full rank.
    with jax.default_matmul_precision("highest"):
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
    return h + linear(Linear(gain), y - linear(w2, h))


def relu_minimum(
    m: jax.Array, p: jax.Array, c: Penalties, factor: jax.Array | float = 1.0
) -> jax.Array:
    """Return the u that minimises gamma (p - factor relu(u))^2 + alpha (u - m)^2, entry by entry.

    Source: Bai et al. 2024, eq. 7, where u is z and the factor 1.

    Args:
      m: Output of the linear before the activation, [... f].
      p: Input of W2, [... f].
      c: Weights of the terms.
      factor: z where a gate is activated, [... f]; 1 without a gate.
    """
    chex.assert_equal_shape([m, p])
    # The objective has one minimum where relu is on and one where it is off.
    on = (c.gamma * factor * p + c.alpha * m) / (c.gamma * factor**2 + c.alpha)
    on, off = jnp.maximum(0, on), jnp.minimum(0, m)

    def cost(u: jax.Array) -> jax.Array:
        return c.gamma * (p - factor * jax.nn.relu(u)) ** 2 + c.alpha * (u - m) ** 2

    # A tie goes to `on`, as in the official code. The choice jumps, so rounding may flip it.
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
    # alpha > 0 keeps the division safe where the gate is closed, g = 0.
    return (c.alpha * m + c.gamma * g * p) / (c.alpha + c.gamma * g**2)


def gauss_newton_step(
    m: jax.Array,
    u: jax.Array,
    p: jax.Array,
    act: str,
    c: Penalties,
    factor: jax.Array | float = 1.0,
) -> jax.Array:
    """Take one Gauss-Newton step from u on alpha (u - m)^2 + gamma (p - factor act(u))^2.

    Args:
      m: Output of the linear before the activation, [... f].
      u: u to start from, [... f].
      p: Input of W2, [... f].
      act: Name of the activation, any with a derivative.
      c: Weights of the terms.
      factor: z where a gate is activated, [... f]; 1 without a gate.

    Returns:
      u [... f]; entries that would raise the objective stay.
    """
    chex.assert_equal_shape([m, u, p])

    def cost(u: jax.Array) -> jax.Array:
        return c.alpha * (u - m) ** 2 + c.gamma * (p - ACTIVATIONS[act](u) * factor) ** 2

    # Unlike the official step of fixed rate, this one is stable however large the factor is.
    g, slope = jax.jvp(ACTIVATIONS[act], (u,), (jnp.ones_like(u),))
    slope = slope * factor
    # The second derivative of act is left out (Gauss-Newton), so the denominator is at least alpha.
    # Newton's own could be zero or negative.
    residual = p - g * factor
    new = u - (c.alpha * (u - m) - c.gamma * slope * residual) / (c.alpha + c.gamma * slope**2)
    # act is not linear, so a full step may go too far.
    return jnp.where(cost(new) < cost(u), new, u)


def activated_step(
    m: jax.Array,
    u: jax.Array,
    p: jax.Array,
    act: str,
    c: Penalties,
    factor: jax.Array | float = 1.0,
) -> jax.Array:
    """Lower alpha (u - m)^2 + gamma (p - factor act(u))^2: u is z, or s where there is a gate.

    Args:
      m: Output of the linear before the activation, [... f].
      u: u to start from, [... f].
      p: Input of W2, [... f].
      act: Name of the activation.
      c: Weights of the terms.
      factor: z where a gate is activated, [... f]; 1 without a gate.

    Returns:
      u [... f]: the minimum for relu, one Gauss-Newton step for a smooth activation.
    """
    if act == "relu":
        # Its slope is 0 where it is off, so a step along the slope would never turn it on.
        return relu_minimum(m, p, c, factor)
    return gauss_newton_step(m, u, p, act, c, factor)


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
    # Measured here, where h is at hand. A pass of its own would run the part again.
    error = jnp.sum((linear(ffn.w2, h) - y) ** 2)
    if s is None:
        # Differences from the outputs: the fits add to W, and where z agrees they add nothing.
        return [activated_step(m[0], z, p, act, c) - m[0]], error
    z = z_gated(m[0], p, ACTIVATIONS[act](s), c)
    return [z - m[0], activated_step(m[1], s, p, act, c, z) - m[1]], error
