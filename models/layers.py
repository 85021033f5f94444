"""Layers that the families share: linear, norms, causal attention, activations.

Letters: b batch, t positions, d hidden size, n query heads, k key-value heads, h head size. Norms
and softmax run in float32 and are cast back, whatever the model's dtype, as `transformers` does.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.precision import product


@struct.dataclass
class Linear:
    """Parameters of y = x w^T + b.

    Attributes:
      w: Weights, [out in], the order of checkpoints and papers.
      b: Bias, [out]; None if the linear has none.
    """

    w: jax.Array
    b: jax.Array | None = None


@struct.dataclass
class Norm:
    """Parameters of a norm.

    Attributes:
      scale: Factor of each channel, [d]; None without affine parameters.
      bias: Offset of each channel, [d]; None in RMS norms and without affine parameters.
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None


def _expand_like(v: jax.Array, x: jax.Array) -> jax.Array:
    """Give v [d] leading axes of size one, to broadcast against x [... d]."""
    # Explicit axes, because the tests forbid implicit rank promotion.
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def linear(p: Linear, x: jax.Array) -> jax.Array:
    """Apply a linear.

    Args:
      p: Parameters, w [out in] and b [out] or None.
      x: Inputs, [... in].

    Returns:
      Outputs, [... out].
    """
    y = product("...i,oi->...o", x, p.w)
    return y if p.b is None else y + _expand_like(p.b, y)


def rms_norm(
    p: Norm, x: jax.Array, eps: float, *, offset: float = 0.0, scale_in_float32: bool = False
) -> jax.Array:
    """Apply a root-mean-square norm.

    Source: Zhang & Sennrich 2019, eq. 4.

    Args:
      p: Parameters, whose scale must be present.
      x: Inputs, [... d].
      eps: Constant added to the mean square.
      offset: Number added to the scale; Gemma's checkpoints hold the scale less one.
      scale_in_float32: True to scale before the cast to the dtype of `x`.

    Returns:
      Normalised inputs in the dtype of `x`, [... d].
    """
    assert p.scale is not None
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if scale_in_float32:
        return (y * (_expand_like(p.scale, x).astype(jnp.float32) + offset)).astype(x.dtype)
    # transformers casts LLaMA's back before it scales; in bfloat16 the order shows.
    return _expand_like(p.scale, x) * y.astype(x.dtype)


def layer_norm(p: Norm, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Apply a layer norm, with or without affine parameters.

    Source: Ba et al. 2016.

    Args:
      p: Parameters; a scale or bias of None is left out.
      x: Inputs, [... d].
      eps: Constant added to the variance.

    Returns:
      Normalised inputs in the dtype of `x`, [... d].
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    if p.scale is not None:
        y = y * _expand_like(p.scale, x)
    return y if p.bias is None else y + _expand_like(p.bias, x)


# Attention takes its queries in chunks of at least CHUNK_SIZE positions, at most MAX_CHUNKS of
# them: each chunk is a piece of the unrolled program, so many chunks compile slowly.
CHUNK_SIZE = 128
MAX_CHUNKS = 8

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


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
    q: jax.Array, k: jax.Array, v: jax.Array, settings: AttentionSettings
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

    Returns:
      Weighted values, [b t n h].
    """
    (b, t, n, h), kv, window = q.shape, k.shape[2], settings.window
    q = scale_queries(q, settings)
    # [z g t h] with z = b * k and g = n / k for q, 1 for k and v.
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * kv, -1, t, h) for x in (q, k, v))
    size, chunks = max(CHUNK_SIZE, -(-t // MAX_CHUNKS)), []
    for start in range(0, t, size):
        end = min(start + size, t)
        first = 0 if window is None else max(0, start - window + 1)
        i, j = np.arange(start, end)[:, None], np.arange(first, end)[None, :]
        visible = (j <= i) if window is None else (j <= i) & (j > i - window)
        # The query heads of a group lie one under the other, so each key-value head is one
        # matrix product.
        rows = q[:, :, start:end].reshape(b * kv, -1, h)
        weights = product(
            "zih,zjh->zij", rows, k[:, 0, first:end], preferred_element_type=jnp.float32
        )
        weights = weights.reshape(b * kv, -1, end - start, end - first)
        weights = attention_weights(weights, visible, settings).astype(v.dtype)
        out = product(
            "zgij,zjh->zgih", weights, v[:, 0, first:end], preferred_element_type=jnp.float32
        )
        chunks.append(out.astype(v.dtype))
    return jnp.concatenate(chunks, axis=2).reshape(b, n, t, h).transpose(0, 2, 1, 3)


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
    fused = {}
    for platform, implementation in FUSED.items():
        kernel = functools.partial(
            fused_attention, settings=settings, implementation=implementation
        )
        # The kernel itself knows best what it takes: cuDNN's needs 16 bits, some head sizes, and
        # a GPU at hand. Asked on shapes, it says so without any work.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            jax.eval_shape(kernel, q, k, v)
            fused[platform] = kernel
    chunked = functools.partial(chunked_attention, settings=settings)
    if not fused:
        return chunked(q, k, v)
    return jax.lax.platform_dependent(q, k, v, default=chunked, **fused)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Split the last axis into heads.

    Args:
      x: Projections of all heads, [b t n*h].
      head_dim: Size h of a head.

    Returns:
      Projections by head, [b t n h].
    """
    return x.reshape(*x.shape[:2], -1, head_dim)
