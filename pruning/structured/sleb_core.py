"""Losses from below: the cross-entropy of windows over a growing part of the vocabulary.

-log p(y) = log(1 + sum over v != y of exp(z_v - z_y)), so a part of the sum is a bound that only rises, and ends at the loss. Vocabularies
that are made by merges, or sorted, begin with the frequent tokens, and the bound is tight early: see BUILD_NOTES.md.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.arch import Arch, NonBlockParams

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


@functools.partial(jax.jit, static_argnums=0)
def _chosen(head: Head, non_block: NonBlockParams, x: jax.Array, tokens: jax.Array) -> jax.Array:
    def one(x: jax.Array, token: jax.Array) -> jax.Array:
        return head(narrowed(non_block, token, 1), x[None, None])[0, 0, 0]

    return jax.vmap(jax.vmap(one))(x[:, :-1], tokens[:, 1:])


def chosen(arch: Arch, non_block: NonBlockParams, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The logit of each window's next tokens, float32 [b t-1]: where the sum of exponentials begins.

    Args:
      x: what leaves the last block [b t d]; tokens: int [b t].
    """
    return _chosen(arch.head, non_block, x, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _add(
    head: Head,
    non_block: NonBlockParams,
    x: jax.Array,
    tokens: jax.Array,
    chosen: jax.Array,
    sums: jax.Array,
    part: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    vocab = len(non_block.embed if non_block.head is None else non_block.head.w)
    size = -(-vocab // PARTS)
    first = jnp.minimum(part * size, vocab)
    start = jnp.minimum(
        first, vocab - size
    )  # the last parts reach back, over tokens that are counted already
    ids, own = start + jnp.arange(size), narrowed(non_block, start, size)

    def window(args: tuple[jax.Array, ...]) -> jax.Array:
        x, tokens, sums = args
        z = head(own, x[None, :-1])[0]
        z = jnp.where((ids[None, :] < first) | (ids[None, :] == tokens[1:, None]), -jnp.inf, z)
        return jnp.logaddexp(sums, jax.nn.logsumexp(z, axis=1))

    sums = jax.lax.map(window, (x, tokens, sums))  # one at a time: logits are large
    return sums, jnp.mean(sums - chosen, axis=1)


def add(
    arch: Arch,
    non_block: NonBlockParams,
    x: jax.Array,
    tokens: jax.Array,
    chosen: jax.Array,
    sums: jax.Array,
    part: int,
) -> tuple[jax.Array, jax.Array]:
    """One more part of the vocabulary, of PARTS from 0 on: (the sums with it, the bound of each window's mean cross-entropy [b]).

    Args:
      x: what leaves the last block [b t d]; tokens: int [b t].
      chosen: what `chosen` gives for them.
      sums: the logarithms of the sums of exponentials so far [b t-1]: at first `chosen`.
    A bound is not above the next one, bit for bit: every step of it is monotone in floating point too.
    """
    return _add(arch.head, non_block, x, tokens, chosen, sums, jnp.int32(part))
