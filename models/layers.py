"""Layers that both families share: linear, norms, rotary positions, causal attention, activations.

Letters: b batch, t positions, d hidden size, n query heads, k key-value heads, h head size. Norms
and softmax run in float32 and are cast back, whatever the model's dtype, as `transformers` does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


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
    y = jnp.einsum("...i,oi->...o", x, p.w)
    return y if p.b is None else y + _expand_like(p.b, y)


def rms_norm(p: Norm, x: jax.Array, eps: float) -> jax.Array:
    """Apply a root-mean-square norm.

    Source: Zhang & Sennrich 2019, eq. 4.

    Args:
      p: Parameters, whose scale must be present.
      x: Inputs, [... d].
      eps: Constant added to the mean square.

    Returns:
      Normalised inputs in the dtype of `x`, [... d].
    """
    assert p.scale is not None
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    # transformers casts back before it scales; in bfloat16 the order shows.
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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Settings of rotary positions.

    Attributes:
      theta: Base of the geometric series of wavelengths.
      kind: "default", "linear", "dynamic" or "llama3".
      factor: Ratio of the longest text after scaling to the longest before.
      max_positions: Length in tokens that the model was trained for. Dynamic scaling begins there;
        for llama3 it is the length before scaling.
      low_freq_factor: Turns within `max_positions` below which llama3 scales a frequency fully.
      high_freq_factor: Turns above which llama3 leaves a frequency as it is.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    max_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def inverse_frequencies(rope: Rope, head_dim: int, length: int) -> np.ndarray:
    """Compute the angles by which one position turns each pair of channels.

    Args:
      rope: Rotary settings.
      head_dim: Size of a head, h.
      length: Tokens in the text.

    Returns:
      Angles in radians, float32 [h/2].
    """
    theta = rope.theta
    if rope.kind == "dynamic" and length > rope.max_positions:
        # Neural-tangent-kernel scaling: the base grows with the length, so that the lowest
        # frequency spans it.
        stretch = rope.factor * length / rope.max_positions - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    # float32 throughout, as in the models' own code: float64 gives other last digits.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    f = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if rope.kind == "linear":
        return f / np.float32(rope.factor)
    if rope.kind == "llama3":
        # Long wavelengths are slowed by `factor`, short ones kept, those between blended.
        turns = rope.max_positions * f / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        blend = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - blend) * f / np.float32(rope.factor) + blend * f
    return f


# Cached, so that all blocks of a program share one pair of constants.
@functools.lru_cache(maxsize=16)
def _rotary_tables(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute cosines and sines, float32 [length h/2], of every position of a text."""
    positions = np.arange(length, dtype=np.float32)
    angle = positions[:, None] * inverse_frequencies(rope, head_dim, length)[None, :]
    return np.cos(angle), np.sin(angle)


def apply_rotary(
    x: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray
) -> jax.Array:
    """Rotate channels i and i + h/2 together, by the angle of their position.

    Args:
      x: Queries or keys, [b t n h].
      cos: Cosines of the angles, [t h/2].
      sin: Sines of the angles, [t h/2].

    Returns:
      Rotated queries or keys, [b t n h].
    """
    # In the model's dtype, as transformers does.
    cos, sin = (jnp.asarray(f, x.dtype)[None, :, None, :] for f in (cos, sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate(rope: Rope, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply rotary position embedding at positions 0..t-1, halves not interleaved.

    Source: Su et al. 2021.

    Args:
      rope: Rotary settings.
      q: Queries, [b t n h].
      k: Keys, [b t k h].

    Returns:
      Rotated queries and keys of the same shapes.
    """
    tables = _rotary_tables(rope, q.shape[-1], q.shape[1])
    return apply_rotary(q, *tables), apply_rotary(k, *tables)


@functools.lru_cache(maxsize=16)
def _frequencies_by_length(rope: Rope, head_dim: int, longest: int) -> np.ndarray:
    """Compute inverse frequencies, float32 [longest+1 h/2], of texts of every length."""
    return np.stack([inverse_frequencies(rope, head_dim, n) for n in range(longest + 1)])


def rotate_from(
    rope: Rope, q: jax.Array, k: jax.Array, start: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Apply rotary position embedding at positions start..start+t-1.

    Args:
      rope: Rotary settings.
      q: Queries, [b t n h].
      k: Keys, [b t k h].
      start: Position of the first token, int [], traced.
      capacity: Number of positions that the cache holds; none may lie beyond it.

    Returns:
      Rotated queries and keys of the same shapes.
    """
    head_dim, t = q.shape[-1], q.shape[1]
    if rope.kind == "dynamic":
        # All angles change with the text's length so far, start + t. Keys that were rotated
        # earlier stay as they are, as in transformers.
        f = jnp.asarray(_frequencies_by_length(rope, head_dim, capacity))[start + t]
        angle = (start + jnp.arange(t)).astype(jnp.float32)[:, None] * f[None, :]
        tables = jnp.cos(angle), jnp.sin(angle)
    else:
        # A slice of the table that `rotate` uses: both give the same bits.
        cos, sin = _rotary_tables(rope, head_dim, capacity)
        tables = (
            jax.lax.dynamic_slice_in_dim(cos, start, t),
            jax.lax.dynamic_slice_in_dim(sin, start, t),
        )
    return apply_rotary(q, *tables), apply_rotary(k, *tables)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """Compute causal attention, scaled by h ** -0.5.

    Queries are processed a chunk at a time over the keys that they see. The upper triangle is not
    computed and a chunk's weights stay in the processor's cache, which is two to four times faster
    on a CPU than all queries at once.

    Args:
      q: Queries, [b t n h], n a multiple of k.
      k: Keys, [b t k h].
      v: Values, [b t k h].
      window: Number of last positions that a query sees; None for all.

    Returns:
      Weighted values, [b t n h].
    """
    (b, t, n, h), kv = q.shape, k.shape[2]
    # [z g t h] with z = b * k and g = n / k for q, 1 for k and v.
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * kv, -1, t, h) for x in (q * h**-0.5, k, v))
    size, chunks = max(CHUNK_SIZE, -(-t // MAX_CHUNKS)), []
    for start in range(0, t, size):
        end = min(start + size, t)
        first = 0 if window is None else max(0, start - window + 1)
        i, j = np.arange(start, end)[:, None], np.arange(first, end)[None, :]
        visible = (j <= i) if window is None else (j <= i) & (j > i - window)
        # The query heads of a group lie one under the other, so each key-value head is one
        # matrix product.
        rows = q[:, :, start:end].reshape(b * kv, -1, h)
        weights = jnp.einsum(
            "zih,zjh->zij", rows, k[:, 0, first:end], preferred_element_type=jnp.float32
        )
        weights = weights.reshape(b * kv, -1, end - start, end - first)
        weights = jnp.where(visible[None, None], weights, -jnp.inf)
        weights = jax.nn.softmax(weights, axis=-1).astype(v.dtype)
        out = jnp.einsum(
            "zgij,zjh->zgih", weights, v[:, 0, first:end], preferred_element_type=jnp.float32
        )
        chunks.append(out.astype(v.dtype))
    return jnp.concatenate(chunks, axis=2).reshape(b, n, t, h).transpose(0, 2, 1, 3)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Split the last axis into heads.

    Args:
      x: Projections of all heads, [b t n*h].
      head_dim: Size h of a head.

    Returns:
      Projections by head, [b t n h].
    """
    return x.reshape(*x.shape[:2], -1, head_dim)
