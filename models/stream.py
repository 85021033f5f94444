"""A narrower residual stream: channels are cut through all that reads, writes or norms them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.arch import Arch, Block, Model, NonBlockParams, linear_of, with_linears
from models.checkpoint.blocks import ChangedBlocks
from models.layers import Linear, Norm
from models.programs import program
from models.rescale import gain_offset, scale_norm, scale_output
from models.surgery import take_entries

# Norm of a block -> tap whose channels it gives, or linear whose output it norms.
BLOCK_NORMS: Mapping[str, str] = {
    "attn_norm": "attn_in",
    "mlp_norm": "mlp_in",
    "attn_out_norm": "o",
    "mlp_out_norm": "down",
}
# Linears whose output a norm may follow.
BRANCHES = ("o", "down")


def width_of(non_block: NonBlockParams) -> int:
    """Return the number of channels of the residual stream.

    Args:
      non_block: Parameters outside the blocks.
    """
    # OPT-350m embeds words in fewer channels than its stream has.
    positions = getattr(non_block, "positions", None)
    return (non_block.embed if positions is None else positions).shape[1]


@program("gains of a norm scaled")
def _times_gain(gains: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Multiply gains [d], stored less `offset`, by a factor."""
    whole = gains.astype(jnp.float32) + offset
    return (whole * factor - offset).astype(gains.dtype)


def _cut_norm(p: Norm, kept: np.ndarray, gain: float, offset: float) -> Norm:
    """Return the norm over the kept channels, its gain times a factor; its bias stays."""
    cut: Norm = jax.tree.map(lambda x: take_entries(x, kept, 0), p)
    if gain == 1.0 or cut.scale is None:
        return cut
    scale = _times_gain(cut.scale, np.float32(gain), np.float32(offset))
    return Norm(scale, cut.bias)


def _cut_linear(p: Linear, kept: np.ndarray, axis: int) -> Linear:
    """Return the linear without the other rows (axis 0, with their biases) or columns."""
    b = p.b if axis == 1 or p.b is None else take_entries(p.b, kept, 0)
    return Linear(take_entries(p.w, kept, axis), b)


def cut_block(arch: Arch, block: Block, keep: np.ndarray, gains: Mapping[str, float]) -> Block:
    """Remove channels of the residual stream from a block.

    Args:
      arch: Architecture.
      block: Parameters.
      keep: Channels that stay, bool [d].
      gains: Factor of the gain of each norm, by its field; absent ones are 1.

    Returns:
      Block of the narrower stream.
    """
    kept = np.flatnonzero(keep)
    offset = gain_offset(arch.config.static)
    new: dict[str, Any] = {}
    for field in BLOCK_NORMS:
        norm = getattr(block, field, None)
        if norm is not None:
            new[field] = _cut_norm(norm, kept, gains.get(field, 1.0), offset)
    router = getattr(block, "router", None)
    if router is not None:
        new["router"] = _cut_linear(router, kept, 1)
    # Every linear reads the stream, or what was made of it, and only those that feed it write.
    linears = {
        s.name: _cut_linear(linear_of(block, s.name), kept, 0 if s.feeds == "next" else 1)
        for s in arch.slots_of(block)
    }
    return with_linears(block, linears).replace(**new)


def cut_non_block(
    arch: Arch, non_block: NonBlockParams, keep: np.ndarray, gain: float
) -> NonBlockParams:
    """Remove channels of the residual stream from the embedding, the final norm and the head.

    Args:
      arch: Architecture.
      non_block: Parameters outside the blocks.
      keep: Channels that stay, bool [d].
      gain: Factor of the final norm's gain.

    Returns:
      Parameters of the narrower stream.
    """
    kept = np.flatnonzero(keep)
    of_family: Any = non_block
    new: dict[str, Any] = {"embed": take_entries(non_block.embed, kept, 1)}
    if getattr(of_family, "positions", None) is not None:
        new["positions"] = take_entries(of_family.positions, kept, 1)
    if of_family.norm is not None:
        new["norm"] = _cut_norm(of_family.norm, kept, gain, gain_offset(arch.config.static))
    if non_block.head is not None:
        new["head"] = _cut_linear(non_block.head, kept, 1)
    return non_block.replace(**new)


def narrow_blocks(
    model: Model, keep: np.ndarray, gains: Callable[[int, Block], Mapping[str, float]]
) -> ChangedBlocks:
    """Return the blocks of a model without some channels of the stream, each cut when it is read.

    Args:
      model: The dense model.
      keep: Channels that stay, bool [d].
      gains: (index, dense block) -> factors of its norms, as `cut_block` has them.
    """

    def cut(i: int, block: Block) -> Block:
        return cut_block(model.arch, block, keep, gains(i, block))

    return ChangedBlocks(model.blocks, cut)


def fit_scale(non_block: Any, old: Any, new: Any) -> Any:
    """Return the parameters that compute under another configuration what they did before.

    Some families scale the embedding by the root of the hidden size.

    Args:
      non_block: Parameters outside the blocks.
      old: Configuration that they were made for.
      new: Configuration that they will be read under.
    """
    scale = getattr(old.static, "embed_scale", 1.0) / getattr(new.static, "embed_scale", 1.0)
    if scale == 1.0:
        return non_block
    embed = scale_output(Linear(non_block.embed), jnp.float32(scale)).w
    if non_block.head is not None:
        return non_block.replace(embed=embed)
    # The embedding serves as the head too, so the final norm gives what it has gained back.
    norm = scale_norm(non_block.norm, jnp.float32(1 / scale), gain_offset(old.static))
    return non_block.replace(embed=embed, norm=norm)
