"""Blocks for a residual stream of another scale."""

from typing import Any

import jax
import jax.numpy as jnp

from models.decoder_config import StaticConfig
from models.layers import Linear, Norm


def scale_output(p: Linear, scale: jax.Array) -> Linear:
    """Return the linear whose output is `scale` times as large.

    Args:
      p: Linear.
      scale: Factor, float32 ().

    Returns:
      Linear, bias included.
    """
    return jax.tree.map(lambda x: _times(x, scale), p)


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    # In float32, and rounded once.
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def scale_norm(p: Norm, scale: jax.Array, offset: float) -> Norm:
    """Return the norm whose output is `scale` times as large.

    Args:
      p: Norm with a gain.
      scale: Factor, float32 ().
      offset: Number that the checkpoint's gain lacks.
    """
    assert p.scale is not None
    gain = (p.scale.astype(jnp.float32) + offset) * scale - offset
    return Norm(gain.astype(p.scale.dtype), None if p.bias is None else _times(p.bias, scale))


def gain_offset(config: Any) -> float:
    """Return the number that a checkpoint's gains lack.

    Args:
      config: Static settings of a family.
    """
    return 1.0 if getattr(config, "norm", "") == "rms_offset" else 0.0


def rescale_block(config: StaticConfig, p: Any, scale: jax.Array) -> Any:
    """Return the block g with g(scale * x) = scale * f(x), for the block f.

    It is exact but for the constant that norms add to a mean square.

    Args:
      config: Static settings.
      p: Parameters of the block f, a `models.decoder.Block`.
      scale: Factor of the stream, float32 ().

    Returns:
      Parameters of the block g.
    """
    offset = gain_offset(config)
    new: dict[str, Any] = {}
    # What a branch adds is scaled where it is last touched: by its norm, or by its last linear.
    for linear, norm in (("o", "attn_out_norm"), ("down", "mlp_out_norm")):
        if getattr(p, norm) is not None:
            new[norm] = scale_norm(getattr(p, norm), scale, offset)
        elif getattr(p, linear) is not None:
            new[linear] = scale_output(getattr(p, linear), scale)
    if p.experts:
        new["experts"] = tuple(e.replace(down=scale_output(e.down, scale)) for e in p.experts)
    # Linears that read the stream without a norm (OLMo2) must see what they saw before.
    attention_raw = p.attn_norm is None
    feed_forward_raw = attention_raw if config.parallel else p.mlp_norm is None
    readers = [("q", "k", "v")] * attention_raw + [("gate", "up")] * feed_forward_raw
    for name in (name for names in readers for name in names):
        linear = getattr(p, name)
        if linear is not None:
            new[name] = Linear(_times(linear.w, 1 / scale), linear.b)
    return p.replace(**new)
