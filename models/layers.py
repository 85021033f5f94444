"""The layers both families are made of: linear, norms, rotary positions, causal attention, activations.

Letters: b batch, t positions, d hidden size, n query heads, k key-value heads, h head size.
Norms and softmax are computed in float32 and cast back, whatever the model's type, as `transformers` does.
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
    """y = x w^T + b. `w` is [out in], as checkpoints and the papers have it; `b` is [out] or absent."""

    w: jax.Array
    b: jax.Array | None = None


@struct.dataclass
class Norm:
    """Scale [d] and, for LayerNorm with affine parameters, bias [d]; both None without affine parameters."""

    scale: jax.Array | None = None
    bias: jax.Array | None = None


def _along_last(v: jax.Array, x: jax.Array) -> jax.Array:
    """v [d] with leading axes of one, to be broadcast against x [... d]."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def linear(p: Linear, x: jax.Array) -> jax.Array:
    """x [... in] -> [... out]."""
    y = jnp.einsum("...i,oi->...o", x, p.w)
    return y if p.b is None else y + _along_last(p.b, y)


def rms_norm(p: Norm, x: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm of x [... d] (Zhang & Sennrich 2019, eq. 4); its scale is always there."""
    assert p.scale is not None
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return _along_last(p.scale, x) * y.astype(x.dtype)


def layer_norm(p: Norm, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Layer norm of x [... d] (Ba et al. 2016), with or without affine parameters."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    if p.scale is not None:
        y = y * _along_last(p.scale, x)
    return y if p.bias is None else y + _along_last(p.bias, x)


CHUNK, MOST_CHUNKS = (
    128,
    8,
)  # queries of attention computed together, and in how many chunks at most

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
    """Rotary position settings. `kind` is default, linear, dynamic or llama3; the last three fields serve llama3 alone."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    max_positions: int = 2048  # what the model was trained for: where dynamic scaling begins, llama3's original length
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def _inverse_frequencies(rope: Rope, head_dim: int, length: int) -> np.ndarray:
    """Inverse frequencies, float32 [h/2], in the arithmetic (float32) of the models' own code."""
    theta = rope.theta
    if rope.kind == "dynamic" and length > rope.max_positions:
        # Neural-tangent-kernel scaling: the base grows with the length, so that the lowest frequency spans it.
        stretch = rope.factor * length / rope.max_positions - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    f = (
        1.0
        / np.power(
            np.float32(theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        )
    ).astype(np.float32)
    if rope.kind == "linear":
        return f / np.float32(rope.factor)
    if rope.kind == "llama3":
        # Long wavelengths are slowed by `factor`, short ones kept, those between blended.
        turns = rope.max_positions * f / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        blend = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - blend) * f / np.float32(rope.factor) + blend * f
    return f


@functools.lru_cache(maxsize=16)
def _turns(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 [length h/2], of the positions 0..length-1 of a text of that length; one pair for all blocks."""
    angle = (
        np.arange(length, dtype=np.float32)[:, None]
        * _inverse_frequencies(rope, head_dim, length)[None, :]
    )
    return np.cos(angle), np.sin(angle)


def apply_rotary(
    x: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray
) -> jax.Array:
    """x [b t n h] turned by angles whose cosines and sines are [t h/2]."""
    cos, sin = (jnp.asarray(f, x.dtype)[None, :, None, :] for f in (cos, sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotate(rope: Rope, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary position embedding (Su et al. 2021) of q [b t n h] and k [b t k h], halves not interleaved, positions 0..t-1."""
    turns = _turns(rope, q.shape[-1], q.shape[1])
    return apply_rotary(q, *turns), apply_rotary(k, *turns)


@functools.lru_cache(maxsize=16)
def _frequencies_by_length(rope: Rope, head_dim: int, longest: int) -> np.ndarray:
    """Inverse frequencies, float32 [longest+1 h/2], of texts of every length."""
    return np.stack([_inverse_frequencies(rope, head_dim, n) for n in range(longest + 1)])


def rotate_from(
    rope: Rope, q: jax.Array, k: jax.Array, start: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """`rotate` for the positions start..start+t-1 (start int [], traced), none of them beyond `capacity`.

    The turns are the very numbers that `rotate` takes, from a table. Only under dynamic scaling are they computed: all of a row changes
    with the text's length so far, which is start+t; keys that were turned before stay as they are, as in `transformers`.
    """
    head_dim, t = q.shape[-1], q.shape[1]
    if rope.kind == "dynamic":
        f = jnp.asarray(_frequencies_by_length(rope, head_dim, capacity))[start + t]
        angle = (start + jnp.arange(t)).astype(jnp.float32)[:, None] * f[None, :]
        turns = jnp.cos(angle), jnp.sin(angle)
    else:
        cos, sin = _turns(rope, head_dim, capacity)
        turns = (
            jax.lax.dynamic_slice_in_dim(cos, start, t),
            jax.lax.dynamic_slice_in_dim(sin, start, t),
        )
    return apply_rotary(q, *turns), apply_rotary(k, *turns)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """Causal attention of q [b t n h] over k, v [b t k h], n a multiple of k; `window` = how many last positions are seen (None: all).

    Returns [b t n h], scaled by h ** -0.5. Queries go a chunk at a time over the keys that they see: the upper triangle is not computed,
    and a chunk's weights stay in a processor's cache, which on a CPU is two to four times faster than all at once.
    """
    (b, t, n, h), kv = q.shape, k.shape[2]
    q, k, v = (
        x.transpose(0, 2, 1, 3).reshape(b * kv, -1, t, h) for x in (q * h**-0.5, k, v)
    )  # [z g t h], g = n / k for q, 1 for k, v
    size, out = max(CHUNK, -(-t // MOST_CHUNKS)), []
    for start in range(0, t, size):
        end = min(start + size, t)
        first = 0 if window is None else max(0, start - window + 1)
        i, j = np.arange(start, end)[:, None], np.arange(first, end)[None, :]
        seen = (j <= i) if window is None else (j <= i) & (j > i - window)
        # The query heads of a group lie one under the other, so each key-value head is one matrix product.
        rows = q[:, :, start:end].reshape(b * kv, -1, h)
        weights = jnp.einsum(
            "zih,zjh->zij", rows, k[:, 0, first:end], preferred_element_type=jnp.float32
        )
        weights = jnp.where(
            seen[None, None], weights.reshape(b * kv, -1, end - start, end - first), -jnp.inf
        )
        weights = jax.nn.softmax(weights, axis=-1).astype(v.dtype)
        out.append(
            jnp.einsum(
                "zgij,zjh->zgih", weights, v[:, 0, first:end], preferred_element_type=jnp.float32
            ).astype(v.dtype)
        )
    return jnp.concatenate(out, axis=2).reshape(b, n, t, h).transpose(0, 2, 1, 3)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[b t n*h] -> [b t n h]."""
    return x.reshape(*x.shape[:2], -1, head_dim)
