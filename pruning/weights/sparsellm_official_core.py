"""SparseLLM's alternation exactly as its authors released it: pseudo-inverses, gradient steps of fixed rate, damping that grows.

Maths only; the letters are `pruning.weights.sparsellm_core`'s. It diverges where activations are large or inputs nearly dependent.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.layers import ACTIVATIONS, Linear, linear
from pruning.weights import sparsegpt_core as sparsegpt
from pruning.weights.sparsellm_core import (
    Counts,
    Ffn,
    Penalties,
    Settings,
    Solved,
    hidden,
    p_gain,
    p_step,
    pruned,
    squared_error,
    z_gated,
    z_relu,
)

RATE, S_STEPS, W_STEPS = 0.01, 2, 10  # of the gradient steps: on s, and on W2 without a gate


class Aux(NamedTuple):
    """Auxiliary activations, float32 [samples t f]; s is None without a gate."""

    z: jax.Array
    s: jax.Array | None
    p: jax.Array


class _State(NamedTuple):
    ffn: Ffn
    h1: jax.Array
    h2: jax.Array
    aux: Aux


def _bias(p: Linear) -> jax.Array:
    return jnp.zeros((1, 1)) if p.b is None else p.b[None, :]


def _flat(a: jax.Array) -> jax.Array:
    return a.reshape(-1, a.shape[-1])


def _prune(
    ws: Sequence[jax.Array], h: jax.Array, counts: Sequence[jax.Array], c: Settings
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """SparseGPT with H [c c]: (the pruned matrices, the H that it leaves damped, the damping)."""
    dead, h = jnp.diagonal(h) == 0, sparsegpt.damped(h, c.damp)
    f = sparsegpt.factor(h, 0.0)._replace(dead=dead)
    return pruned(ws, f, counts, c.rule), h, c.damp + f.damping


def _descend(loss: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int) -> jax.Array:
    """Plain gradient descent at RATE."""
    optimizer = optax.sgd(RATE)

    def step(
        carry: tuple[jax.Array, optax.OptState], _: None
    ) -> tuple[tuple[jax.Array, optax.OptState], None]:
        x, state = carry
        updates, state = optimizer.update(jax.grad(loss)(x), state)
        return (jnp.asarray(optax.apply_updates(x, updates)), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), None, steps)[0][0]


def _half(
    state: _State, x: jax.Array, y: jax.Array, counts: Counts, c: Settings
) -> tuple[_State, tuple[jax.Array, jax.Array]]:
    """Prune the weights as they are, then set p, z, s in turn: (the state, (the part's mean squared error, damping))."""
    z, s, _ = state.aux
    ws, h1, damping1 = _prune([p.w for p in state.ffn.writers], state.h1, counts.writers, c)
    (w2,), h2, damping2 = _prune([state.ffn.w2.w], state.h2, [counts.w2], c)
    ffn, k = state.ffn.with_writers(ws).with_w2(w2), c.penalties
    gain = p_gain(ffn.w2, k)

    def sample(a: tuple[jax.Array, ...]) -> Aux:
        x, y, z, *gate = a
        p = p_step(ffn.w2, gain, y, hidden(z, gate[0] if gate else None, c.act))
        if ffn.gate is None:
            return Aux(z_relu(linear(ffn.w1, x), p, k), None, p)
        # The released formula has no penalties in it.
        z = z_gated(linear(ffn.w1, x), p, ACTIVATIONS[c.act](gate[0]), Penalties(1.0, 1.0, 1.0))
        m = linear(ffn.gate, x)
        s = _descend(
            lambda s: jnp.sum(
                k.alpha * (s - m) ** 2 + k.gamma * (p - ACTIVATIONS[c.act](s) * z) ** 2
            ),
            gate[0],
            S_STEPS,
        )
        return Aux(z, s, p)

    aux = jax.lax.map(sample, (x, y, z) if s is None else (x, y, z, s))
    return _State(ffn, h1, h2, aux), (
        squared_error(ffn, x, y, c.act) / float(y.size),
        jnp.maximum(damping1, damping2),
    )


def _pinv(x: jax.Array) -> jax.Array:
    return jnp.linalg.pinv(_flat(x), rtol=1e-15)  # no direction is cut


def _fit(state: _State, x_pinv: jax.Array, y: jax.Array) -> _State:
    """Dense weights that fit the auxiliary activations: by pseudo-inverse, but W2 without a gate by gradient steps; and p's own H."""
    ffn, (z, s, p) = state.ffn, state.aux
    targets = [z] if s is None else [z, s]
    ws = [(x_pinv @ (_flat(t) - _bias(w))).T for w, t in zip(ffn.writers, targets, strict=True)]
    right, flat = _flat(y) - _bias(ffn.w2), _flat(p)
    w2 = (
        _descend(lambda w: jnp.mean((flat @ w.T - right) ** 2), ffn.w2.w, W_STEPS)
        if s is None
        else (_pinv(p) @ right).T
    )
    return state._replace(ffn=ffn.with_writers(ws).with_w2(w2), h2=(2.0 / len(p)) * flat.T @ flat)


def solve_official(
    ffn: Ffn,
    x: jax.Array,
    y: jax.Array,
    aux: Aux,
    h1: jax.Array,
    h2: jax.Array,
    counts: Counts,
    c: Settings,
) -> Solved:
    """The released loop; the last iteration stays, whatever its error.

    Args:
      x: what entered the dense part, float32 [samples t d].
      y: what left it, likewise.
      aux: the same of its inside.
      h1: H of X [d d].
      h2: H of p [f f].
    """

    def half(state: _State) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        return _half(state, x, y, counts, c)

    with jax.default_matmul_precision("highest"):
        state, (loss, damping) = half(_State(ffn, h1, h2, aux))
        losses, dampings = loss[None], damping[None]
        if c.iterations > 1:
            x_pinv = _pinv(x)
            state, more = jax.lax.scan(
                lambda s, _: half(_fit(s, x_pinv, y)), state, None, c.iterations - 1
            )
            losses, dampings = jnp.append(losses, more[0]), jnp.append(dampings, more[1])
        return Solved(state.ffn, losses, jnp.max(dampings))
