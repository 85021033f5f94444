"""Selection of the next token: the most likely one, or a draw from the nucleus."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Traced settings of random sampling.

    Attributes:
      temperature: Divisor of the logits, float [].
      top_p: Probability of the nucleus, float []; None for all tokens.
      key: Key of the draws.
    """

    temperature: jax.Array
    top_p: jax.Array | None
    key: jax.Array


def nucleus(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Restrict logits to the nucleus.

    The nucleus is the smallest set of most likely tokens, at least one, whose total probability
    reaches `top_p`, with those that tie with its last.

    Source: Holtzman et al. 2020, section 3.1.

    Args:
      logits: Logits, [b vocab].
      sampling: Temperature and top_p.

    Returns:
      Logits divided by the temperature, -inf outside the nucleus, [b vocab].
    """
    logits = logits / sampling.temperature
    if sampling.top_p is None:
        return logits
    # From the most likely token down.
    order = -jnp.sort(-logits, axis=-1)
    p = jax.nn.softmax(order, axis=-1)
    # A token is inside if the more likely ones together do not reach top_p.
    inside = jnp.cumsum(p, axis=-1) - p < sampling.top_p
    # The first token is inside whatever top_p and rounding say.
    inside = inside.at[:, 0].set(True)
    least = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def select_token(logits: jax.Array, sampling: Sampling | None, i: int | jax.Array) -> jax.Array:
    """Select a new token of every row.

    Args:
      logits: Logits, [b vocab].
      sampling: Settings of random sampling; None takes the most likely token.
      i: Number of the new token, which the draw depends on.

    Returns:
      Token ids, int32 [b].
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # One key for each position, so that a longer text begins with the shorter one.
    key = jax.random.fold_in(sampling.key, i)
    return jax.random.categorical(key, nucleus(logits, sampling)).astype(jnp.int32)
