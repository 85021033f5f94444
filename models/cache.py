"""Key-value cache, so that one more token costs the work of one token.

Letters: b batch, t new positions, c capacity, n query heads, k key-value heads, h head size. Shapes
are static: a cache has room for c positions from the start and does not record how many are filled.
Head counts come from a block's arrays, so blocks may differ in them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from models.attention import AttentionSettings, attention, attention_weights, scale_queries
from models.layers import Linear
from models.precision import product
from models.rotary import Rope, rotate, rotate_from

T = TypeVar("T")
# (q [b t n h], k [b t k h], v [b t k h]) -> (weighted values [b t n h], state that it returns).
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, T]]
# Position of the first new token: an int, or int [] traced.
Start = int | jax.Array


class Cache(NamedTuple):
    """Keys and values of one block.

    Attributes:
      k: Keys after rotation, [b k c h], zero at positions without a token.
      v: Values, [b k c h], zero at positions without a token.
    """

    k: jax.Array
    v: jax.Array


def empty_cache(k: Linear, head_dim: int, batch: int, capacity: int) -> Cache:
    """Make an empty cache for a block.

    Args:
      k: Key projection of the block, whose rows and dtype the cache follows.
      head_dim: Size h of a head.
      batch: Number b of texts.
      capacity: Number c of positions.

    Returns:
      Cache of zeros.
    """
    zeros = jnp.zeros((batch, k.w.shape[0] // head_dim, capacity, head_dim), k.w.dtype)
    return Cache(zeros, zeros)


def _write(cache: Cache, start: Start, k: jax.Array, v: jax.Array) -> Cache:
    """Write k and v, each [b t k h], at the positions from `start`."""
    at = (0, 0, start, 0)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    return Cache(
        jax.lax.dynamic_update_slice(cache.k, k, at), jax.lax.dynamic_update_slice(cache.v, v, at)
    )


def attend(
    cache: Cache,
    start: Start,
    rope: Rope | None,
    settings: AttentionSettings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Compute causal attention of new positions over the cache and themselves.

    The caller keeps positions within the capacity: `dynamic_update_slice` would clamp them and
    overwrite others.

    Args:
      cache: Keys and values of earlier positions.
      start: Position of the first new token. With the int 0 the cache is empty and the new
        positions see only each other, in the chunks of `attention`.
      rope: Rotary settings; None where the block rotates nothing.
      settings: Window, scale and cap.
      q: Queries before rotation, [b t n h], n a multiple of k.
      k: Keys before rotation, [b t k h].
      v: Values, [b t k h].

    Returns:
      Weighted values, [b t n h], and the cache with the new positions written.
    """
    if isinstance(start, int) and start == 0:
        if rope is not None:
            q, k = rotate(rope, q, k)
        return attention(q, k, v, settings), _write(cache, 0, k, v)
    if rope is not None:
        q, k = rotate_from(rope, q, k, jnp.asarray(start), cache.k.shape[2])
    # Read before written: with attention over the new cache XLA copies twice as many caches.
    return _attend_cached(q, k, v, cache, start, settings), _write(cache, start, k, v)


def _attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Cache,
    start: Start,
    settings: AttentionSettings,
) -> jax.Array:
    """Attend from new positions over those in the cache and over themselves.

    Args:
      q: Queries after rotation, [b t n h], at the positions from `start`.
      k: Keys after rotation, [b t k h].
      v: Values, [b t k h].
      cache: Keys and values of the positions before `start`.
      start: Position of the first new token.
      settings: Window, scale and cap.

    Returns:
      Weighted values, [b t n h].
    """
    (b, t, n, h), (_, kv, c, _), window = q.shape, cache.k.shape, settings.window
    # The query heads of a group lie one under the other, so each key-value head is one matrix
    # product, as in `attention`.
    rows = scale_queries(q, settings).transpose(0, 2, 1, 3).reshape(b * kv, -1, h)
    old = Cache(*(x.reshape(b * kv, c, h) for x in cache))
    new = Cache(*(x.transpose(0, 2, 1, 3).reshape(b * kv, t, h) for x in (k, v)))
    # Positions from the first new one on. Static shapes: those that are not filled yet are masked
    # rather than cut off, as if they came after all others.
    cached = jnp.arange(c) - start
    j = jnp.concatenate([jnp.where(cached < 0, cached, t), jnp.arange(t)])[None, :]
    i = jnp.arange(t)[:, None]
    visible = (j <= i) if window is None else (j <= i) & (j > i - window)
    multiply = functools.partial(product, preferred_element_type=jnp.float32)
    products = [multiply("zih,zjh->zij", rows, keys) for keys in (old.k, new.k)]
    joined = jnp.concatenate(products, axis=2).reshape(b * kv, -1, t, c + t)
    weights = attention_weights(joined, visible, settings).astype(v.dtype)
    of_old, of_new = jnp.split(weights.reshape(b * kv, -1, c + t), [c], axis=2)
    out = multiply("zij,zjh->zih", of_old, old.v) + multiply("zij,zjh->zih", of_new, new.v)
    return out.astype(v.dtype).reshape(b, n, t, h).transpose(0, 2, 1, 3)
