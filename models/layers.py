"""The layers both families are made of: linear, norms, rotary positions, causal attention, activations.

Letters: b batch, t positions, d hidden size, n query heads, k key-value heads, h head size.
Norms and softmax are computed in float32 and cast back, whatever the model's type, as `transformers` does.
"""

import dataclasses
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
    f = (1.0 / np.power(np.float32(theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))).astype(np.float32)
    if rope.kind == "linear":
        return f / np.float32(rope.factor)
    if rope.kind == "llama3":
        # Long wavelengths are slowed by `factor`, short ones kept, those between blended.
        turns = rope.max_positions * f / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        blend = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - blend) * f / np.float32(rope.factor) + blend * f
    return f


def rotate(rope: Rope, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary position embedding (Su et al. 2021) of q [b t n h] and k [b t k h], halves not interleaved, positions 0..t-1."""
    length, head_dim = q.shape[1], q.shape[-1]
    angle = np.arange(length, dtype=np.float32)[:, None] * _inverse_frequencies(rope, head_dim, length)[None, :]
    cos, sin = (jnp.asarray(f(angle), q.dtype)[None, :, None, :] for f in (np.cos, np.sin))  # [1 t 1 h/2]

    def turn(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return turn(q), turn(k)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """Causal attention of q [b t n h] over k, v [b t k h], n a multiple of k; `window` = how many last positions are seen (None: all).

    Returns [b t n h], scaled by h ** -0.5.
    """
    # The library counts the positions before the present one, checkpoints' configurations count the present one too.
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


def heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[b t n*h] -> [b t n h]."""
    return x.reshape(*x.shape[:2], -1, head_dim)
