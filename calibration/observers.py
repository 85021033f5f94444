"""Streaming statistics of activations: a few numbers a channel, updated micro-batch by micro-batch.

An observer is a value of two pure functions, as an optax transformation is:
`init(channels) -> state` and `update(state, x [b t c]) -> state`. Sums are float32 whatever the
type of x. Observers are hashable, for use as static arguments of jit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.experts import Routed
from models.precision import product


class Observer(NamedTuple):
    """A streaming statistic.

    Attributes:
      init: channels -> initial state.
      update: (state, x [b t c]) -> state.
      of_experts: The statistic of each expert's tokens: its `update` takes the states of all
        experts, stacked [e ...], and a Routed. None where the statistic has no such form.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, Any], Any]
    of_experts: "Observer | None" = None


def _expert_sums(routed: Routed, weights: jax.Array | None = None) -> jax.Array:
    """Return each expert's sum of squares, float32 [e c], with the weights [tiles r] of rows."""
    squares = jnp.square(routed.x.astype(jnp.float32))
    if weights is not None:
        squares = squares * weights[:, :, None]
    return routed.sum_by_expert(jnp.sum(squares, axis=1))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a + b as rounded, and the exact rounding error.

    Source: Knuth, The Art of Computer Programming 2, 4.2.2, theorem B.
    """
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


def _compensated(total: jax.Array, lost: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Sum numbers `total + lost` along an axis in pairs, and keep what rounding loses."""
    # In pairs: a running sum would be a chain of dependent steps, one a chunk.
    while (n := total.shape[axis]) > 1:
        if n % 2:
            pad = [(0, int(i == axis)) for i in range(total.ndim)]
            total, lost = jnp.pad(total, pad), jnp.pad(lost, pad)
        (a, b), (c, d) = jnp.split(total, 2, axis), jnp.split(lost, 2, axis)
        total, new = _two_sum(a, b)
        lost = c + d + new
    return total.squeeze(axis), lost.squeeze(axis)


CHUNK = 16  # tokens summed without compensation: their rounding errors are independent


def _sum_over_tokens(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum y [b t c] over sequences and tokens; return (rounded, lost), each [c]."""
    # Within each sequence first, on the device that holds it.
    y = jnp.pad(y, ((0, 0), (0, -y.shape[1] % CHUNK), (0, 0)))
    chunks = y.reshape(len(y), -1, CHUNK, y.shape[2]).sum(axis=2)
    return _compensated(*_compensated(chunks, jnp.zeros_like(chunks), axis=1), axis=0)


class SecondMoment(NamedTuple):
    """Sum of squares of each channel.

    The sum does not depend on how sequences are batched, so that near ties of scores fall the same
    way for every micro-batch.

    Attributes:
      total: Sum over all tokens of x^2, float32 [c], rounded once.
      samples: Sequences seen, float32 ().
      lost: Rounding errors of the additions [c].
    """

    total: jax.Array
    samples: jax.Array
    lost: jax.Array

    @property
    def per_sample(self) -> jax.Array:
        """Return the mean over sequences of the squared L2 norm over tokens [c].

        Source: `scaler_row` of Sun et al. 2024 (eq. 1, squared).
        """
        return self.total / self.samples


def _add(state: SecondMoment, squares: jax.Array) -> SecondMoment:
    """Add a micro-batch of squares [b t c], float32."""
    return _add_sums(state, *_sum_over_tokens(squares), len(squares))


def _add_sums(
    state: SecondMoment, new: jax.Array, lost: jax.Array | float, samples: int
) -> SecondMoment:
    """Add sums [c], with what their rounding has lost [c]."""
    # The second sum gives back to the total what all additions so far have lost, so that it is
    # rounded once, whatever the micro-batch.
    total, more = _two_sum(state.total, new)
    total, lost = _two_sum(total, state.lost + lost + more)
    return SecondMoment(total, state.samples + samples, lost)


def _second_moment_update(state: SecondMoment, x: jax.Array) -> SecondMoment:
    return _add(state, jnp.square(x.astype(jnp.float32)))


def second_moment_init(c: int) -> SecondMoment:
    """Return the state before any token, of c channels."""
    return SecondMoment(jnp.zeros(c), jnp.zeros(()), jnp.zeros(c))


def add_experts(state: SecondMoment, routed: Routed) -> SecondMoment:
    """Add a micro-batch of every expert's tokens to the states of all experts, [e ...]."""
    # Samples are windows here too: all linears of a block are on one scale.
    return _add_sums(state, _expert_sums(routed), 0.0, routed.windows)


second_moment = Observer(
    second_moment_init,
    _second_moment_update,
    Observer(second_moment_init, add_experts),
)


def _fading_update(state: SecondMoment, x: jax.Array) -> SecondMoment:
    weight = 2.0 / (
        state.samples + 1 + jnp.arange(len(x), dtype=jnp.float32)
    )  # of the n-th sequence: 2/n
    return _add(state, jnp.square(x.astype(jnp.float32)) * weight[:, None, None])


# NeuroAL's official code takes the norms of SparseGPT's inputs after SparseGPT has scaled them, so
# that later sequences count less.
def _expert_fading(state: SecondMoment, routed: Routed) -> SecondMoment:
    nth = state.samples[0] + 1 + routed.window.astype(jnp.float32)  # alike for all experts
    return _add_sums(state, _expert_sums(routed, 2.0 / nth), 0.0, routed.windows)


fading_second_moment = Observer(
    second_moment_init, _fading_update, Observer(second_moment_init, _expert_fading)
)


# Cached: fresh lambdas would be another static argument, and compile again.
@functools.cache
def pair(a: Observer, b: Observer) -> Observer:
    """Return an observer with the states of both; the compiler does shared work once."""
    of_experts = None
    if a.of_experts is not None and b.of_experts is not None:
        of_experts = pair(a.of_experts, b.of_experts)
    return Observer(
        lambda c: (a.init(c), b.init(c)),
        lambda state, x: (a.update(state[0], x), b.update(state[1], x)),
        of_experts,
    )


class BatchNorms(NamedTuple):
    """Norms of each channel by micro-batch.

    Attributes:
      total: Sum over micro-batches of the L2 norm over the batch's tokens, float32 [c].
      batches: Micro-batches seen, float32 ().
    """

    total: jax.Array
    batches: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Return the mean of the norms over micro-batches [c].

        It depends on how samples are batched, as in LLM-Rank's official code.
        """
        return self.total / self.batches


def _batch_norms_update(state: BatchNorms, x: jax.Array) -> BatchNorms:
    x = x.astype(jnp.float32)
    return BatchNorms(state.total + jnp.sqrt(jnp.einsum("btc,btc->c", x, x)), state.batches + 1)


def _batch_norms_init(c: int) -> BatchNorms:
    return BatchNorms(jnp.zeros(c), jnp.zeros(()))


def _expert_batch_norms(state: BatchNorms, routed: Routed) -> BatchNorms:
    return BatchNorms(state.total + jnp.sqrt(_expert_sums(routed)), state.batches + 1)


batch_norms = Observer(
    _batch_norms_init, _batch_norms_update, Observer(_batch_norms_init, _expert_batch_norms)
)


class Gram(NamedTuple):
    """Gram matrix of the channels.

    Attributes:
      total: Sum over all tokens of x x^T, float32 [c c].
      samples: Sequences seen, float32 ().
    """

    total: jax.Array
    samples: jax.Array


def outer_products(x: jax.Array) -> jax.Array:
    """Return the sum over tokens of x x^T.

    bfloat16 is multiplied as it is, with sums in float32: its products are exact in float32, and
    CPUs, GPUs and TPUs form them several times faster.

    Args:
      x: Activations [b t c].

    Returns:
      Sums, float32 [c c].
    """
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    # All of it: multiplying one triangle saves less than mirroring it costs on a CPU. TPUs' default
    # bfloat16 passes may make H indefinite, and it would not factor.
    in_float32 = {"precision": "highest", "preferred_element_type": jnp.float32}
    return product("btc,btd->cd", x, x, **in_float32)


def _gram_update(state: Gram, x: jax.Array) -> Gram:
    return Gram(state.total + outer_products(x), state.samples + x.shape[0])


def _gram_init(c: int) -> Gram:
    return Gram(jnp.zeros((c, c)), jnp.zeros(()))


def _expert_grams(state: Gram, routed: Routed) -> Gram:
    def add(total: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, expert = tile
        return total.at[expert].add(outer_products(x[None])), None

    tiles = routed.x, routed.expert
    total, _ = jax.lax.scan(add, state.total, tiles)
    return Gram(total, state.samples + routed.windows)


gram = Observer(_gram_init, _gram_update, Observer(_gram_init, _expert_grams))

# Tokens that were routed to each expert, of the tap `models.experts.EXPERT_TOKENS`.
token_counts = Observer(jnp.zeros, lambda state, tokens: state + tokens.astype(jnp.float32))
