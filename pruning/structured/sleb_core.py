"""Bound a loss from below: cross-entropy over a growing part of the vocabulary.

-log p(y) = log(1 + sum over v != y of exp(z_v - z_y)), so a part of the sum is a bound that only
rises, and ends at the loss. Vocabularies that are made by merges, or sorted, begin with the
frequent tokens, so the bound is tight early.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import chex
import jax
import jax.numpy as jnp

from models.layers import Linear

PARTS = 16  # parts of the vocabulary


class HeadParams(Protocol):
    """Parameters that an output head reads, as `NonBlockParams` has them."""

    @property
    def embed(self) -> Any:
        """Return the token embedding [vocab d]."""

    @property
    def head(self) -> Linear | None:
        """Return the output head; None where the embedding serves as the head."""

    def replace(self, **fields: Any) -> Self:
        """Return a copy with other values of the given fields."""


P = TypeVar("P", bound=HeadParams)
Head = Callable[[Any, jax.Array], jax.Array]  # `Arch.head`: (parameters, x [b t d]) -> [b t vocab]


def _vocab(params: HeadParams) -> int:
    """Return the number of tokens that the head scores."""
    return len(params.embed if params.head is None else params.head.w)


def narrow_head(params: P, start: jax.Array, size: int) -> P:
    """Return the parameters with a head for a part of the vocabulary.

    Args:
      params: Parameters of the head.
      start: First token of the part, int32 ().
      size: Number of tokens in it.
    """

    def part(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    if params.head is None:
        return params.replace(embed=part(params.embed))
    return params.replace(head=jax.tree.map(part, params.head))


def chosen_logits(head: Head, params: HeadParams, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the logit of each window's next tokens, float32 [b t-1].

    The sum of exponentials begins with it.

    Args:
      head: `Arch.head`.
      params: Parameters of the head.
      x: Output of the last block [b t d].
      tokens: Windows, int [b t].
    """
    chex.assert_rank(x, 3)
    chex.assert_shape(tokens, x.shape[:2])
    chex.assert_type(tokens, int)

    def one(x: jax.Array, token: jax.Array) -> jax.Array:
        return head(narrow_head(params, token, 1), x[None, None])[0, 0, 0]

    # One row of the head for each token: the logits of the whole vocabulary would be large.
    with jax.named_scope("chosen_logits"):
        return jax.vmap(jax.vmap(one))(x[:, :-1], tokens[:, 1:])


def add_part(
    head: Head,
    params: HeadParams,
    x: jax.Array,
    tokens: jax.Array,
    chosen: jax.Array,
    sums: jax.Array,
    part: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Add one more part of the vocabulary to the sums of exponentials.

    A bound is never above the next one, bit for bit: each of its steps is monotone in floating
    point.

    Args:
      head: `Arch.head`.
      params: Parameters of the head.
      x: Output of the last block [b t d].
      tokens: Windows, int [b t].
      chosen: `chosen_logits` of them [b t-1].
      sums: Logarithms of the sums of exponentials so far [b t-1]; at first `chosen`.
      part: Index of the part, int32 (), from 0 to PARTS - 1.

    Returns:
      The sums with this part [b t-1], and the bound of each window's mean cross-entropy [b], in
      nats.
    """
    chex.assert_rank([x, part], [3, 0])
    chex.assert_shape(tokens, x.shape[:2])
    chex.assert_shape([chosen, sums], (x.shape[0], x.shape[1] - 1))
    vocab = _vocab(params)
    size = -(-vocab // PARTS)
    first = jnp.minimum(part * size, vocab)
    # Every part has the same shape, so the last ones reach back over tokens already counted.
    start = jnp.minimum(first, vocab - size)
    ids = start + jnp.arange(size)
    narrow = narrow_head(params, start, size)

    def window(args: tuple[jax.Array, ...]) -> jax.Array:
        x, tokens, sums = args
        z = head(narrow, x[None, :-1])[0]
        # The next token is in the sum from the start, by its chosen logit.
        counted = (ids[None, :] < first) | (ids[None, :] == tokens[1:, None])
        z = jnp.where(counted, -jnp.inf, z)
        return jnp.logaddexp(sums, jax.nn.logsumexp(z, axis=1))

    with jax.named_scope("loss_bound"):
        # One window at a time: logits are large.
        sums = jax.lax.map(window, (x, tokens, sums))
        return sums, jnp.mean(sums - chosen, axis=1)


def influence(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the block influence, 1 - mean over tokens of cos(x, y), float32 ().

    Source: Men et al. 2024 (ShortGPT), eq. 1.

    Args:
      x: Hidden states before the block [b t d].
      y: Hidden states after it [b t d].
    """
    chex.assert_rank(x, 3)
    chex.assert_equal_shape([x, y])
    with jax.named_scope("influence"):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        norms = jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1)
        # The constant keeps states of zeros from becoming NaN; it is below any norm that matters.
        cos = jnp.sum(x * y, axis=-1) * jax.lax.rsqrt(norms + 1e-30)
        return 1 - jnp.mean(cos)
