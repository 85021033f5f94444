"""Causal attention: chunks of matrix products, or a fused kernel where the platform has one.

Letters: b batch, t positions, n query heads, k key-value heads, h head size, z = b * k, g = n / k.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.precision import product

# Attention takes its queries in chunks of at least CHUNK_SIZE positions, at most MAX_CHUNKS of
# them: each chunk is a piece of the unrolled program, so many chunks compile slowly.
CHUNK_SIZE = 128
MAX_CHUNKS = 8
# On a CPU as many heads attend at once as have this many bytes of weights in a chunk, so that the
# weights stay in the cache. A loop over more, smaller parts leaves cores idle.
CACHED_BYTES = 2 << 20


class AttentionSettings(NamedTuple):
    """Static settings of a block's attention.

    Attributes:
      window: Number of last positions that a query sees; None for all.
      scale: Factor of the products of queries and keys; None for h ** -0.5.
      cap: Bound that a tanh puts on them before the mask; None without one.
    """

    window: int | None = None
    scale: float | None = None
    cap: float | None = None


def scale_queries(q: jax.Array, settings: AttentionSettings) -> jax.Array:
    """Scale the queries, [b t n h], in place of their products with the keys.

    Args:
      q: Queries, [b t n h].
      settings: Settings of the attention.

    Returns:
      Scaled queries, [b t n h].
    """
    return q * (q.shape[-1] ** -0.5 if settings.scale is None else settings.scale)


def attention_weights(
    products: jax.Array, visible: jax.Array | np.ndarray, settings: AttentionSettings
) -> jax.Array:
    """Turn products of queries and keys into weights.

    Args:
      products: Scaled products, float32 [z g i j].
      visible: True where query i sees key j, bool [i j].
      settings: Settings of the attention.

    Returns:
      Weights that sum to one over the keys, float32 [z g i j].
    """
    if settings.cap is not None:
        products = settings.cap * jnp.tanh(products / settings.cap)
    return jax.nn.softmax(jnp.where(visible[None, None], products, -jnp.inf), axis=-1)


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    settings: AttentionSettings,
    cached_bytes: int | None = None,
) -> jax.Array:
    """Compute causal attention with matrix products alone.

    Queries are processed a chunk at a time over the keys that they see. The upper triangle is not
    computed and a chunk's weights stay in the processor's cache, which is two to four times faster
    on a CPU than all queries at once.

    Args:
      q: Queries, [b t n h], n a multiple of k.
      k: Keys, [b t k h].
      v: Values, [b t k h].
      settings: Window, scale and cap.
      cached_bytes: Bytes for the weights of a chunk. As many key-value heads as fit attend at
        once, at least one; None for all of them. On a CPU four windows of 2,048 tokens take 0.4 of
        the time of all heads at once, with equal results.

    Returns:
      Weighted values, [b t n h].
    """
    (b, t, n, h), kv = q.shape, k.shape[2]
    q = scale_queries(q, settings)
    # [z g t h] with z = b * k and g = n / k for q, 1 for k and v.
    heads = tuple(x.transpose(0, 2, 1, 3).reshape(b * kv, -1, t, h) for x in (q, k, v))
    attend = functools.partial(_attend_heads, settings)
    if cached_bytes is None:
        out = attend(*heads)
    else:
        most = cached_bytes // (4 * (n // kv) * _chunk_size(t) * t)
        out = _attend_in_parts(attend, max(1, most), *heads)
    return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)


def _chunk_size(t: int) -> int:
    """Return the positions of a chunk of queries."""
    return min(t, max(CHUNK_SIZE, -(-t // MAX_CHUNKS)))


def _attend_in_parts(
    attend: Callable[..., jax.Array], most: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Attend with at most `most` key-value heads at a time."""
    # Equal parts: a smaller last one would be compiled again.
    size = next(n for n in range(min(most, len(q)), 0, -1) if len(q) % n == 0)
    parts = tuple(x.reshape(-1, size, *x.shape[1:]) for x in (q, k, v))
    # A gradient computes the weights again, in less time than it takes to store and read them.
    again = jax.checkpoint(lambda part: attend(*part), prevent_cse=False)
    return jax.lax.map(again, parts).reshape(q.shape)


def _attend_heads(
    settings: AttentionSettings, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Attend with all heads at once.

    Args:
      settings: Window and cap.
      q: Scaled queries, [z g t h], of the g query heads of each key-value head.
      k: Keys, [z 1 t h].
      v: Values, [z 1 t h].

    Returns:
      Weighted values, [z g t h].
    """
    (z, _, t, h), window = q.shape, settings.window
    size, chunks = _chunk_size(t), []
    for start in range(0, t, size):
        end = min(start + size, t)
        first = 0 if window is None else max(0, start - window + 1)
        i, j = np.arange(start, end)[:, None], np.arange(first, end)[None, :]
        visible = (j <= i) if window is None else (j <= i) & (j > i - window)
        # The query heads of a group lie one under the other, so each key-value head is one
        # matrix product.
        rows = q[:, :, start:end].reshape(z, -1, h)
        weights = product(
            "zih,zjh->zij", rows, k[:, 0, first:end], preferred_element_type=jnp.float32
        )
        weights = weights.reshape(z, -1, end - start, end - first)
        weights = attention_weights(weights, visible, settings).astype(v.dtype)
        out = product(
            "zgij,zjh->zgih", weights, v[:, 0, first:end], preferred_element_type=jnp.float32
        )
        chunks.append(out.astype(v.dtype))
    return jnp.concatenate(chunks, axis=2)


# Fused attention by platform, as `jax.nn.dot_product_attention` names implementations. Elsewhere
# chunks: on a CPU for their speed, and compiled for a TPU v5e "xla" holds all weights at once (4
# GiB in place of 0.4 for 4 x 2048 tokens, 32 heads) and does twice the work.
FUSED = {"cuda": "cudnn"}
OLDEST_GPU = 8.0  # compute capability that cuDNN's kernel needs; JAX does not ask for it


def _check_gpus() -> None:
    """Raise NotImplementedError for a GPU too old for cuDNN's kernel, RuntimeError without GPUs."""
    if any(float(d.compute_capability) < OLDEST_GPU for d in jax.local_devices(backend="cuda")):
        raise NotImplementedError("a GPU here is too old for the kernel")


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, settings: AttentionSettings, implementation: Any
) -> jax.Array:
    """Compute causal attention in a kernel that holds no weights in memory.

    Args:
      q: Queries, [b t n h], n a multiple of k.
      k: Keys, [b t k h].
      v: Values, [b t k h].
      settings: Window and scale; there is no kernel with a cap.
      implementation: As `jax.nn.dot_product_attention` names it.

    Returns:
      Weighted values, [b t n h].

    Raises:
      NotImplementedError: The kernel has no form for these sizes, or for a cap.
      RuntimeError: There is no such kernel here.
      ValueError: The kernel does not take these types.
    """
    if settings.cap is not None:
        raise NotImplementedError("no kernel caps the products of queries and keys")
    if implementation == "cudnn":
        _check_gpus()
    # A window counts the query's own position, and JAX's only those before it.
    window = None if settings.window is None else (settings.window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=settings.scale,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )


def attention(q: jax.Array, k: jax.Array, v: jax.Array, settings: AttentionSettings) -> jax.Array:
    """Compute causal attention, fused where the platform has a kernel that takes the arguments.

    Args:
      q: Queries, [b t n h], n a multiple of k.
      k: Keys, [b t k h].
      v: Values, [b t k h].
      settings: Window, scale and cap.

    Returns:
      Weighted values, [b t n h].
    """
    chunked = functools.partial(chunked_attention, settings=settings)
    by_platform: dict[str, Callable[..., jax.Array]] = {}
    if jax.device_count() == 1:
        # A loop over heads that lie on several devices would gather them.
        by_platform["cpu"] = functools.partial(chunked, cached_bytes=CACHED_BYTES)
    for platform, implementation in FUSED.items():
        kernel = functools.partial(
            fused_attention, settings=settings, implementation=implementation
        )
        # The kernel itself knows best what it takes: cuDNN's needs 16 bits, some head sizes, and
        # a GPU at hand. Asked on shapes, it says so without any work.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            jax.eval_shape(kernel, q, k, v)
            by_platform[platform] = kernel
    if not by_platform:
        return chunked(q, k, v)
    return jax.lax.platform_dependent(q, k, v, default=chunked, **by_platform)
