"""SparseLLM (Bai et al. 2024), official maths: pseudo-inverses and fixed gradient steps.

The letters are those of `pruning.weights.sparsellm_core`. The loop diverges where activations are
large or inputs nearly dependent.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from models.layers import ACTIVATIONS, Linear, linear
from pruning.weights import sparsegpt_core as sparsegpt
from pruning.weights.sparsellm_core import (
    Counts,
    Ffn,
    Penalties,
    Settings,
    Solution,
    hidden,
    p_gain,
    p_step,
    relu_minimum,
    squared_error,
    z_gated,
)
from pruning.weights.sparsellm_solvers_core import sparsegpt_pruned

# The rate is fixed, whatever the activations. A step on s is stable only while RATE (2 alpha + 2
# gamma (z act'(s))^2) <= 2, and massive activations of SmolLM2 take that to 634.
RATE = 0.01  # of the gradient steps
S_STEPS = 2  # gradient steps on s
W_STEPS = 10  # gradient steps on W2, without a gate


class Aux(NamedTuple):
    """Auxiliary activations, float32 [samples t f].

    Attributes:
      z: Output of W1.
      s: Output of the gate; None without one.
      p: Input of W2.
    """

    z: jax.Array
    s: jax.Array | None
    p: jax.Array


class _State(NamedTuple):
    """State of the alternation: the part, H of X [d d], H of p [f f], and the activations."""

    ffn: Ffn
    h1: jax.Array
    h2: jax.Array
    aux: Aux


def _bias(p: Linear) -> jax.Array:
    """Return the bias as a row, zero where there is none."""
    return jnp.zeros((1, 1)) if p.b is None else p.b[None, :]


def _flatten(a: jax.Array) -> jax.Array:
    """Return activations as [tokens c]."""
    return a.reshape(-1, a.shape[-1])


def _prune(
    ws: Sequence[jax.Array], h: jax.Array, counts: Sequence[jax.Array], c: Settings
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Prune by SparseGPT with H [c c].

    Returns:
      The pruned matrices, H with its damping, and the damping.
    """
    # The official code damps H in place, so that its damping grows with each iteration.
    dead, h = jnp.diagonal(h) == 0, sparsegpt.damped(h, c.damp)
    # Dead inputs are found before the damping, which hides them.
    f = sparsegpt.factor(h, 0.0)._replace(dead=dead)
    return sparsegpt_pruned(ws, f, counts, c.pattern), h, c.damp + f.damping


def _descend(loss: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> jax.Array:
    """Return the end of plain gradient descent at RATE."""

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + -RATE * jax.grad(loss)(x), None

    return jax.lax.scan(step, start, None, steps)[0]


def _prune_and_update(
    state: _State, x: jax.Array, y: jax.Array, counts: Counts, c: Settings
) -> tuple[_State, tuple[jax.Array, jax.Array]]:
    """Prune the weights as they are, then update p, z and s in turn.

    Returns:
      The state, and the part's mean squared error and damping, [] each.
    """
    z, s, _ = state.aux
    with jax.named_scope("prune"):
        ws, h1, damping1 = _prune([p.w for p in state.ffn.writers], state.h1, counts.writers, c)
        (w2,), h2, damping2 = _prune([state.ffn.w2.w], state.h2, [counts.w2], c)
    ffn, k = state.ffn.with_writers(ws).with_w2(w2), c.penalties
    gain = p_gain(ffn.w2, k)

    def update_sample(a: tuple[jax.Array, ...]) -> Aux:
        x, y, z, *gate = a
        # The official order: p from the old z and s, z from the new p and old s, then s from both.
        p = p_step(ffn.w2, gain, y, hidden(z, gate[0] if gate else None, c.act))
        if ffn.gate is None:
            return Aux(relu_minimum(linear(ffn.w1, x), p, k), None, p)
        # The official formula has no penalties in it.
        z = z_gated(linear(ffn.w1, x), p, ACTIVATIONS[c.act](gate[0]), Penalties(1.0, 1.0, 1.0))
        m = linear(ffn.gate, x)

        def objective(s: jax.Array) -> jax.Array:
            mismatch = k.gamma * (p - ACTIVATIONS[c.act](s) * z) ** 2
            return jnp.sum(k.alpha * (s - m) ** 2 + mismatch)

        return Aux(z, _descend(objective, gate[0], S_STEPS), p)

    with jax.named_scope("update_p_z_and_s"):
        # A sample at a time, to save memory. All terms are sums over tokens, so the cut changes
        # nothing.
        aux = jax.lax.map(update_sample, (x, y, z) if s is None else (x, y, z, s))
    loss = squared_error(ffn, x, y, c.act) / float(y.size)
    return _State(ffn, h1, h2, aux), (loss, jnp.maximum(damping1, damping2))


def _pinv(x: jax.Array) -> jax.Array:
    """Return the pseudo-inverse of activations, [c tokens]."""
    # The tolerance is below float32's, so that no direction is cut.
    return jnp.linalg.pinv(_flatten(x), rtol=1e-15)


def _fit(state: _State, x_pinv: jax.Array, y: jax.Array) -> _State:
    """Fit dense weights to the auxiliary activations, and recompute H of p.

    W1 and its gate are fitted by pseudo-inverse, and so is W2 behind a gate; without one W2 takes
    gradient steps.
    """
    ffn, (z, s, p) = state.ffn, state.aux
    targets = [z] if s is None else [z, s]
    with jax.named_scope("fit_w1"):
        ws = [
            (x_pinv @ (_flatten(t) - _bias(w))).T for w, t in zip(ffn.writers, targets, strict=True)
        ]
    right, flat = _flatten(y) - _bias(ffn.w2), _flatten(p)
    with jax.named_scope("fit_w2"):
        if s is None:
            # Starts at the pruned W2: the steps are so small that zeros stay near zero and go
            # again.
            w2 = _descend(lambda w: jnp.mean((flat @ w.T - right) ** 2), ffn.w2.w, W_STEPS)
        else:
            w2 = (_pinv(p) @ right).T
    # H of p is made anew. H of X is kept, with all the damping it has had.
    h2 = (2.0 / len(p)) * flat.T @ flat
    return state._replace(ffn=ffn.with_writers(ws).with_w2(w2), h2=h2)


def solve_official(
    ffn: Ffn,
    x: jax.Array,
    y: jax.Array,
    aux: Aux,
    h1: jax.Array,
    h2: jax.Array,
    counts: Counts,
    c: Settings,
) -> Solution:
    """Run the authors' loop; the last iteration stays, whatever its error.

    Args:
      ffn: The dense part.
      x: Its input, float32 [samples t d].
      y: Its output, float32 [samples t d].
      aux: Its auxiliary activations.
      h1: H of X, [d d].
      h2: H of p, [f f].
      counts: Entries to remove.
      c: Settings.
    """
    chex.assert_rank([x, y, aux.z, aux.p], 3)
    chex.assert_type([x, y, aux.z, aux.p, h1, h2], jnp.float32)
    chex.assert_shape([h1, h2], [(x.shape[-1],) * 2, (aux.p.shape[-1],) * 2])

    def half(state: _State) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        return _prune_and_update(state, x, y, counts, c)

    def iterate(state: _State, _: None) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        return half(_fit(state, x_pinv, y))

    with jax.default_matmul_precision("highest"):
        state, (loss, damping) = half(_State(ffn, h1, h2, aux))
        losses, dampings = loss[None], damping[None]
        if c.iterations > 1:
            # X never changes, so one pseudo-inverse serves all iterations.
            x_pinv = _pinv(x)
            state, (more_losses, more_dampings) = jax.lax.scan(
                iterate, state, None, c.iterations - 1
            )
            losses = jnp.append(losses, more_losses)
            dampings = jnp.append(dampings, more_dampings)
        return Solution(state.ffn, losses, jnp.max(dampings))
