"""Keys and values of the positions so far, so that a text grows by a token at the cost of a token.

Letters: b batch, t new positions, c capacity, n query heads, k key-value heads, h head size. Shapes are static: a cache has room for c
positions from the start, and says nothing of how many are filled. Head counts come from a block's arrays, so blocks may differ in them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from models.layers import Rope, attention, rotate, rotate_from

T = TypeVar("T")
AttendFn = Callable[
    [jax.Array, jax.Array, jax.Array], tuple[jax.Array, T]
]  # q [b t n h], k, v [b t k h] -> ([b t n h], what is kept)
Start = int | jax.Array  # position of the first new token: an int, or int [] traced


class Cache(NamedTuple):
    """Keys (turned to their positions) and values of one block, each [b k c h], zero where no token has been yet."""

    k: jax.Array
    v: jax.Array


def empty(block: Any, head_dim: int, batch: int, capacity: int) -> Cache:
    """A cache for a block, in its key projection's type, with room for `capacity` positions of `batch` texts."""
    zeros = jnp.zeros((batch, block.k.w.shape[0] // head_dim, capacity, head_dim), block.k.w.dtype)
    return Cache(zeros, zeros)


def _write(cache: Cache, start: Start, k: jax.Array, v: jax.Array) -> Cache:
    """The cache with k, v [b t k h] at the positions from `start`."""
    at = (0, 0, start, 0)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    return Cache(
        jax.lax.dynamic_update_slice(cache.k, k, at), jax.lax.dynamic_update_slice(cache.v, v, at)
    )


def attend(
    cache: Cache,
    start: Start,
    rope: Rope | None,
    window: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Causal attention of the positions start..start+t-1 over them and the cache's, and the cache with them written.

    Args:
      start: with the int 0 nothing is cached yet, and the new positions see each other alone, in `attention`'s chunks.
      rope: how queries and keys are turned; None where positions are learned.
      window: how many last positions are seen; None: all.
      q: [b t n h], n a multiple of k; k, v: [b t k h]; before turning.
    Returns ([b t n h], cache). Positions beyond the capacity are the caller's error: `dynamic_update_slice` would write them over others.
    """
    if isinstance(start, int) and start == 0:
        q, k = (q, k) if rope is None else rotate(rope, q, k)
        return attention(q, k, v, window), _write(cache, 0, k, v)
    q, k = (q, k) if rope is None else rotate_from(rope, q, k, jnp.asarray(start), cache.k.shape[2])
    cache = _write(cache, start, k, v)
    return _over_cache(q, cache, start, window), cache


def _over_cache(q: jax.Array, cache: Cache, start: Start, window: int | None) -> jax.Array:
    """`attention`'s arithmetic for queries [b t n h] at the positions from `start`, over all of the cache, the unseen masked."""
    (b, t, n, h), (_, kv, c, _) = q.shape, cache.k.shape
    # The query heads of a group lie one under the other, so each key-value head is one matrix product.
    rows = (q * h**-0.5).transpose(0, 2, 1, 3).reshape(b * kv, -1, h)
    keys, values = (x.reshape(b * kv, c, h) for x in cache)
    i, j = (start + jnp.arange(t))[:, None], jnp.arange(c)[None, :]
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    weights = jnp.einsum("zih,zjh->zij", rows, keys, preferred_element_type=jnp.float32)
    weights = jnp.where(seen[None, None], weights.reshape(b * kv, -1, t, c), -jnp.inf)
    weights = jax.nn.softmax(weights, axis=-1).astype(values.dtype).reshape(b * kv, -1, c)
    out = jnp.einsum("zij,zjh->zih", weights, values, preferred_element_type=jnp.float32).astype(
        values.dtype
    )
    return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)
