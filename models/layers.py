"""Layers that the families share: linear, norms, causal attention, activations.

Letters: b batch, t positions, d hidden size, n query heads, k key-value heads, h head size. Norms
and softmax run in float32 and are cast back, whatever the model's dtype, as `transformers` does.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
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


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Split the last axis into heads.

    Args:
      x: Projections of all heads, [b t n*h].
      head_dim: Size h of a head.

    Returns:
      Projections by head, [b t n h].
    """
    return x.reshape(*x.shape[:2], -1, head_dim)
