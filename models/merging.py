"""Two neighbouring blocks as one that runs them in parallel, twice as wide."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.arch import Arch
from models.decoder_config import Config, StaticConfig
from models.layers import Linear, Norm
from models.programs import program
from models.rescale import gain_offset

# Norm before each branch -> linears that read it.
READERS: Mapping[str, tuple[str, ...]] = {
    "attn_norm": ("q", "k", "v"),
    "mlp_norm": ("gate", "up"),
}


def why_not_mergeable(arch: Arch) -> str:
    """Return the reason why no two blocks of an architecture can be merged; empty if they can.

    Args:
      arch: Architecture.
    """
    config = arch.config
    if not isinstance(config, Config) or config.static.norm == "layer":
        return "layer norms with biases before the branches cannot be folded into what reads them"
    if config.static.parallel:
        return "both branches of a block read one norm"
    if arch.branch_norms:
        return "a norm follows each branch, and the sum of two branches has another"
    if config.qk_norm:
        return "queries and keys have norms, whose gains differ from block to block"
    if arch.has_experts:
        return "a router chooses among the experts of its own block"
    return ""


def can_merge(arch: Arch, i: int, j: int) -> bool:
    """Return True if two blocks have the same window and rotary positions.

    Args:
      arch: Architecture whose blocks can be merged at all.
      i: Index of a block.
      j: Index of another.
    """
    config: Config = arch.config
    return config.windows[i] == config.windows[j] and config.rope_of(i) == config.rope_of(j)


def merge(arch: Arch, first: Any, second: Any) -> Any:
    """Return the block that adds to the stream what both blocks add to it.

    The gains of the norms go into the linears behind them, as a block has one gain for all. Both
    attention parts read the merged block's input, and both feed-forward parts the stream behind
    both attention parts.

    Args:
      arch: Architecture whose blocks can be merged.
      first: Parameters of a block, a `models.decoder.Block`.
      second: Parameters of the next one.

    Returns:
      Block with the heads and neurons of the first, then those of the second.
    """
    return _merge(arch.config.static, first, second)


@program("blocks merged", static=(0,))
def _merge(config: StaticConfig, first: Any, second: Any) -> Any:
    offset = gain_offset(config)
    new: dict[str, Any] = {}
    for norm, readers in READERS.items():
        gain = getattr(first, norm).scale
        new[norm] = Norm(jnp.full_like(gain, 1 - offset))
        for name in readers:
            if getattr(first, name) is not None:
                new[name] = _stacked([_folded(b, norm, name, offset) for b in (first, second)])
    for name in ("o", "down"):
        new[name] = _joined(getattr(first, name), getattr(second, name))
    return first.replace(**new)


def _folded(block: Any, norm: str, name: str, offset: float) -> Linear:
    """Return a linear with the gains of the norm before it in its columns."""
    linear = getattr(block, name)
    gain = getattr(block, norm).scale.astype(jnp.float32) + offset
    # In float32, and rounded once.
    w = linear.w.astype(jnp.float32) * gain[None, :]
    return Linear(w.astype(linear.w.dtype), linear.b)


def _stacked(linears: list[Linear]) -> Linear:
    """Return the linear whose output rows are those of both."""
    w = jnp.concatenate([p.w for p in linears])
    if all(p.b is None for p in linears):
        return Linear(w)
    return Linear(w, jnp.concatenate([_bias(p) for p in linears]))


def _joined(a: Linear, b: Linear) -> Linear:
    """Return the linear that adds the outputs of both over the inputs of both."""
    w = jnp.concatenate([a.w, b.w], axis=1)
    return Linear(w, None if a.b is None and b.b is None else _bias(a) + _bias(b))


def _bias(p: Linear) -> jax.Array:
    """Return a linear's bias, of zeros where it has none: a repair may have given one to some."""
    return jnp.zeros(len(p.w), p.w.dtype) if p.b is None else p.b
