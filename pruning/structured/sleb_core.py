"""Losses from below: the cross-entropy of windows over a growing part of the vocabulary.

-log p(y) = log(1 + sum over v != y of exp(z_v - z_y)), so a part of the sum is a bound that only rises, and ends at the loss. Vocabularies
that are made by merges, or sorted, begin with the frequent tokens, and the bound is tight early: see BUILD_NOTES.md.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.arch import NonBlockParams

PARTS = 16  # of the vocabulary
Head = Callable[[NonBlockParams, jax.Array], jax.Array]


def narrowed(non_block: NonBlockParams, start: jax.Array, size: int) -> NonBlockParams:
    """The ends with a head for the tokens from `start` (int32 ()) on alone, `size` of them."""

    def part(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    return (
        non_block.replace(embed=part(non_block.embed))
        if non_block.head is None
        else non_block.replace(head=jax.tree.map(part, non_block.head))
    )


def chosen_logits(
    head: Head, non_block: NonBlockParams, x: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Return the logit of each window's next tokens, float32 [b t-1].

    It is where the sum of exponentials begins.

    Args:
      head: `Arch.head`.
      non_block: Parameters of the head.
      x: Output of the last block [b t d].
      tokens: int [b t].
    """

    def one(x: jax.Array, token: jax.Array) -> jax.Array:
        return head(narrowed(non_block, token, 1), x[None, None])[0, 0, 0]

    return jax.vmap(jax.vmap(one))(x[:, :-1], tokens[:, 1:])


def add_part(
    head: Head,
    non_block: NonBlockParams,
    x: jax.Array,
    tokens: jax.Array,
    chosen: jax.Array,
    sums: jax.Array,
    part: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Add one more part of the vocabulary to the sums of exponentials.

    A bound is never above the next one, bit for bit: every step of it is monotone in floating point.

    Args:
      head: `Arch.head`.
      non_block: Parameters of the head.
      x: Output of the last block [b t d].
      tokens: int [b t].
      chosen: `chosen_logits` of them [b t-1].
      sums: Logarithms of the sums of exponentials so far [b t-1]; at first `chosen`.
      part: Index of the part, int32 (), from 0 to PARTS - 1.

    Returns:
      The sums with this part [b t-1], and the bound of each window's mean cross-entropy in nats [b].
    """
    vocab = len(non_block.embed if non_block.head is None else non_block.head.w)
    size = -(-vocab // PARTS)
    first = jnp.minimum(part * size, vocab)
    # The last parts reach back, over tokens that are counted already.
    start = jnp.minimum(first, vocab - size)
    ids, own = start + jnp.arange(size), narrowed(non_block, start, size)

    def window(args: tuple[jax.Array, ...]) -> jax.Array:
        x, tokens, sums = args
        z = head(own, x[None, :-1])[0]
        z = jnp.where((ids[None, :] < first) | (ids[None, :] == tokens[1:, None]), -jnp.inf, z)
        return jnp.logaddexp(sums, jax.nn.logsumexp(z, axis=1))

    sums = jax.lax.map(window, (x, tokens, sums))  # one at a time: logits are large
    return sums, jnp.mean(sums - chosen, axis=1)


def influence(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the block influence, 1 - mean over tokens of cos(x, y), float32 ().

    Source: Men et al. 2024 (ShortGPT), eq. 1.

    Args:
      x: Hidden states before the block [b t d].
      y: Hidden states after it [b t d].
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1)
    cos = jnp.sum(x * y, axis=-1) * jax.lax.rsqrt(norms + 1e-30)
    return 1 - jnp.mean(cos)
