"""OPT family as pure functions over pytrees: pre- and post-norm, projected embeddings, ReLU, GELU.

Source: Zhang et al. 2022.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from models.arch import Arch, Group, Member, Slot, Taps
from models.attention import AttentionSettings, attention
from models.cache import AttendFn, Cache, Start, T, attend
from models.layers import ACTIVATIONS, Linear, Norm, layer_norm, linear, split_heads
from models.precision import product
from models.rescale import scale_output

# The first two rows of the position table are never read: a relic of padding in fairseq.
POSITION_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings that cannot be inferred from parameter shapes, with the sizes of the dense model.

    Attributes:
      head_dim: Size of a head.
      act: Name of the activation, a key of `models.layers.ACTIVATIONS`.
      pre_norm: True if norms come before attention and feed-forward; False in OPT-350m alone.
      final_norm: True if a norm follows the last block.
      dim: Hidden size.
      word_dim: Size of the token embedding, projected to `dim` where they differ.
      ffn_dim: Neurons of a block.
      vocab: Number of tokens.
      positions: Number of learned positions.
      affine: True if the norms have scale and bias.
      tied: True if the embedding serves as the head.
      biases: Slots that have a bias.
      widths: Heads and neurons of each block where blocks differ, else empty.
    """

    head_dim: int
    act: str = "relu"
    pre_norm: bool = True
    final_norm: bool = True
    dim: int = 0
    word_dim: int = 0
    ffn_dim: int = 0
    vocab: int = 0
    positions: int = 0
    affine: bool = True
    tied: bool = True
    biases: tuple[str, ...] = ()
    widths: tuple[tuple[int, int], ...] = ()

    @property
    def heads_fill_stream(self) -> bool:
        """Return True: the stock class needs heads that make up the hidden size."""
        return True

    @property
    def stream_multiple(self) -> int:
        """Return a number that the hidden size must be a multiple of."""
        return self.head_dim

    @property
    def static(self) -> "StaticConfig":
        """Return the settings that the functions of the architecture compute with."""
        return StaticConfig(self.head_dim, self.act, self.pre_norm)


class StaticConfig(NamedTuple):
    """Settings that the functions depend on; everything else is in the parameter shapes.

    Attributes:
      head_dim: Size of a head.
      act: Name of the activation.
      pre_norm: True if norms come before attention and feed-forward.
    """

    head_dim: int
    act: str
    pre_norm: bool


class Block(struct.PyTreeNode):
    """Parameters of one decoder block.

    Letters: d hidden size, n heads, h head size, f neurons.

    Attributes:
      attn_norm: Norm of the attention, [d]; it follows attention in post-norm models.
      q: Query projection, [n*h d].
      k: Key projection, [n*h d].
      v: Value projection, [n*h d].
      o: Output projection, [d n*h].
      mlp_norm: Norm of the feed-forward part, [d]; it follows in post-norm models.
      fc1: First feed-forward linear, [f d].
      fc2: Second feed-forward linear, [d f].
    """

    attn_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    fc1: Linear
    fc2: Linear


class NonBlockParams(struct.PyTreeNode):
    """Parameters outside the blocks.

    Attributes:
      embed: Token embedding, [vocab word_dim].
      positions: Learned positions, [positions + 2, d].
      norm: Final norm, [d]; None in post-norm models.
      project_in: Projection of the embedding, [d word_dim]; None where the sizes agree.
      project_out: Projection before the head, [word_dim d]; None where the sizes agree.
      head: Output head, [vocab word_dim]; None where the embedding serves as the head.
    """

    embed: jax.Array
    positions: jax.Array
    norm: Norm | None = None
    project_in: Linear | None = None
    project_out: Linear | None = None
    head: Linear | None = None


def _embed(non_block: NonBlockParams, tokens: jax.Array, start: Start = 0) -> jax.Array:
    x = non_block.embed[tokens]
    # OPT-350m alone embeds words in fewer dimensions than its blocks have.
    if non_block.project_in is not None:
        x = linear(non_block.project_in, x)
    positions = jax.lax.dynamic_slice_in_dim(
        non_block.positions, POSITION_OFFSET + start, tokens.shape[1]
    )
    return x + positions[None]


def _head(non_block: NonBlockParams, x: jax.Array) -> jax.Array:
    if non_block.norm is not None:
        x = layer_norm(non_block.norm, x)
    if non_block.project_out is not None:
        x = linear(non_block.project_out, x)
    w = non_block.embed if non_block.head is None else non_block.head.w
    # float32 logits from a product in the model's dtype: the loss sums over a whole vocabulary.
    return product("btd,vd->btv", x, w, preferred_element_type=jnp.float32)


def _forward(
    config: StaticConfig, p: Block, x: jax.Array, attend_fn: AttendFn[T]
) -> tuple[jax.Array, Taps, T]:
    """Run a block with the given attention.

    Args:
      config: Static settings.
      p: Parameters of the block.
      x: Hidden states, [b t d].
      attend_fn: Attention over queries, keys and values by head.

    Returns:
      Hidden states [b t d], taps, and the state that `attend_fn` returned. The taps hold each
      linear's input under its tap's name and each linear's output under the slot's name.
    """
    # jit drops the taps that the caller does not use. The scopes name the steps in a profile.
    taps: dict[str, jax.Array] = {}
    with jax.named_scope("attention_norm"):
        taps["attn_in"] = layer_norm(p.attn_norm, x) if config.pre_norm else x
    with jax.named_scope("qkv_projections"):
        taps["q"] = linear(p.q, taps["attn_in"])
        taps["k"] = linear(p.k, taps["attn_in"])
        taps["v"] = linear(p.v, taps["attn_in"])
    with jax.named_scope("attention"):
        values, state = attend_fn(*(split_heads(taps[name], config.head_dim) for name in "qkv"))
        # The width follows from the heads that this block still has.
        taps["attn_mid"] = values.reshape(*x.shape[:2], -1)
    with jax.named_scope("attention_output"):
        taps["o"] = linear(p.o, taps["attn_mid"])
        x = x + taps["o"]
    if not config.pre_norm:
        # OPT-350m normalises the residual stream itself, after each part.
        with jax.named_scope("attention_norm"):
            x = layer_norm(p.attn_norm, x)
    with jax.named_scope("feed_forward_norm"):
        taps["mlp_in"] = layer_norm(p.mlp_norm, x) if config.pre_norm else x
    with jax.named_scope("feed_forward"):
        taps["fc1"] = linear(p.fc1, taps["mlp_in"])
        taps["mlp_mid"] = ACTIVATIONS[config.act](taps["fc1"])
        taps["fc2"] = linear(p.fc2, taps["mlp_mid"])
        x = x + taps["fc2"]
    if not config.pre_norm:
        with jax.named_scope("feed_forward_norm"):
            x = layer_norm(p.mlp_norm, x)
    return x, taps, state


def _block(config: StaticConfig, p: Block, x: jax.Array) -> tuple[jax.Array, Taps]:
    def attend_all(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention(q, k, v, AttentionSettings()), None

    x, taps, _ = _forward(config, p, x, attend_all)
    return x, taps


def _step(
    config: StaticConfig, p: Block, x: jax.Array, cache: Cache, start: Start
) -> tuple[jax.Array, Cache]:
    # Positions are learned and attention is full: neither rotary settings nor a window.
    attend_fn = functools.partial(attend, cache, start, None, AttentionSettings())
    x, _, cache = _forward(config, p, x, attend_fn)
    return x, cache


def _rescale(p: Block, scale: jax.Array) -> Block:
    """Return the block g with g(scale * x) = scale * f(x), for a pre-norm block f."""
    return p.replace(o=scale_output(p.o, scale), fc2=scale_output(p.fc2, scale))


# In the order of OPT's checkpoints; reports and budgets follow it.
SLOTS = (
    Slot("k", "attn_in", "attn_mid"),
    Slot("v", "attn_in", "attn_mid"),
    Slot("q", "attn_in", "attn_mid"),
    Slot("o", "attn_mid", "next"),
    Slot("fc1", "mlp_in", "mlp_mid"),
    Slot("fc2", "mlp_mid", "next"),
)


# Cached by the static settings, so a program compiled for a model also serves the one pruned
# from it: jit compares functions by identity.
@functools.cache
def _functions(c: StaticConfig) -> tuple[Callable[..., Any], ...]:
    """Bind `block` and `step` to static settings; `head` depends on none."""
    return functools.partial(_block, c), _head, functools.partial(_step, c)


@functools.cache
def arch(config: Config) -> Arch:
    """Bind the family's functions to a configuration.

    Args:
      config: Configuration; equal ones give the same object.

    Returns:
      Architecture.
    """
    h = config.head_dim
    block, head, step = _functions(config.static)
    heads = Group(
        "heads", Member("o", 1, h), (Member("q", 0, h), Member("k", 0, h), Member("v", 0, h))
    )
    neurons = Group("neurons", Member("fc2", 1, 1), (Member("fc1", 0, 1),))
    # After a norm at the block's end its output is no longer the residual stream.
    return Arch(
        config,
        _embed,
        block,
        head,
        step,
        SLOTS,
        (heads, neurons),
        residual=config.pre_norm,
        # Without a norm at the end the head sees the scale of the stream.
        rescale=_rescale if config.pre_norm and config.final_norm else None,
    )
