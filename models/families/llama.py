"""LLaMA family (LLaMA 1-3, Mistral, TinyLlama, SmolLM2, Qwen2) as pure functions over pytrees.

Source: Touvron et al. 2023, with grouped-query attention (Ainslie et al. 2023). Biases are present
when the checkpoint has them. Head counts come from the arrays, so a block may have fewer heads or
neurons than its neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from models.arch import Arch, Group, Member, Slot, Taps
from models.cache import AttendFn, Cache, Start, T, attend
from models.layers import (
    ACTIVATIONS,
    Linear,
    Norm,
    Rope,
    attention,
    linear,
    rms_norm,
    rotate,
    split_heads,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings that cannot be inferred from parameter shapes, with the sizes of the dense model.

    Attributes:
      head_dim: Size of a head.
      eps: Constant of the RMS norms.
      act: Name of the activation, a key of `models.layers.ACTIVATIONS`.
      rope: Rotary settings.
      windows: Sliding window of each block in positions, None for full attention.
      dim: Hidden size.
      ffn_dim: Neurons of a block.
      query_heads: Query heads of a block.
      kv_heads: Key-value heads of a block.
      vocab: Number of tokens.
      tied: True if the embedding serves as the head.
      biases: Slots that have a bias.
      widths: Key-value heads and neurons of each block where blocks differ, else empty.
    """

    head_dim: int
    eps: float = 1e-6
    act: str = "silu"
    rope: Rope = dataclasses.field(default_factory=Rope)
    windows: tuple[int | None, ...] = ()
    dim: int = 0
    ffn_dim: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    vocab: int = 0
    tied: bool = False
    biases: tuple[str, ...] = ()
    widths: tuple[tuple[int, int], ...] = ()

    @property
    def static(self) -> "StaticConfig":
        """Return the settings that the functions of the architecture compute with."""
        return StaticConfig(self.head_dim, self.eps, self.act, self.rope)


class StaticConfig(NamedTuple):
    """Settings that the functions depend on; everything else is in the parameter shapes.

    Attributes:
      head_dim: Size of a head.
      eps: Constant of the RMS norms.
      act: Name of the activation.
      rope: Rotary settings.
    """

    head_dim: int
    eps: float
    act: str
    rope: Rope


class Block(struct.PyTreeNode):
    """Parameters of one decoder block.

    Letters: d hidden size, n query heads, k key-value heads, h head size, f neurons.

    Attributes:
      attn_norm: Norm before attention, scale [d].
      q: Query projection, [n*h d].
      k: Key projection, [k*h d].
      v: Value projection, [k*h d].
      o: Output projection, [d n*h].
      mlp_norm: Norm before the feed-forward part, scale [d].
      gate: Gate projection, [f d].
      up: Up projection, [f d].
      down: Down projection, [d f].
      window: Sliding window in positions, None for full attention. It is static, so blocks that
        differ in it are compiled separately.
    """

    attn_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    gate: Linear
    up: Linear
    down: Linear
    window: int | None = struct.field(pytree_node=False, default=None)


class NonBlockParams(struct.PyTreeNode):
    """Parameters outside the blocks.

    Attributes:
      embed: Token embedding, [vocab d].
      norm: Final norm, scale [d].
      head: Output head, [vocab d]; None where the embedding serves as the head.
    """

    embed: jax.Array
    norm: Norm
    head: Linear | None = None


def _embed(non_block: NonBlockParams, tokens: jax.Array, start: Start = 0) -> jax.Array:
    # Positions enter in the blocks, so `start` has no effect here.
    return non_block.embed[tokens]


def _head(config: StaticConfig, non_block: NonBlockParams, x: jax.Array) -> jax.Array:
    w = non_block.embed if non_block.head is None else non_block.head.w
    x = rms_norm(non_block.norm, x, config.eps)
    # float32 logits from a product in the model's dtype: the loss sums over a whole vocabulary.
    return jnp.einsum("btd,vd->btv", x, w, preferred_element_type=jnp.float32)


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
        taps["attn_in"] = rms_norm(p.attn_norm, x, config.eps)
    with jax.named_scope("qkv_projections"):
        # Three products rather than one fused: each linear is pruned and cut by itself.
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
    with jax.named_scope("feed_forward_norm"):
        taps["mlp_in"] = rms_norm(p.mlp_norm, x, config.eps)
    with jax.named_scope("feed_forward"):
        taps["gate"] = linear(p.gate, taps["mlp_in"])
        taps["up"] = linear(p.up, taps["mlp_in"])
        taps["mlp_mid"] = ACTIVATIONS[config.act](taps["gate"]) * taps["up"]
        taps["down"] = linear(p.down, taps["mlp_mid"])
        x = x + taps["down"]
    return x, taps, state


def _block(config: StaticConfig, p: Block, x: jax.Array) -> tuple[jax.Array, Taps]:
    def attend_all(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention(*rotate(config.rope, q, k), v, p.window), None

    x, taps, _ = _forward(config, p, x, attend_all)
    return x, taps


def _step(
    config: StaticConfig, p: Block, x: jax.Array, cache: Cache, start: Start
) -> tuple[jax.Array, Cache]:
    attend_fn = functools.partial(attend, cache, start, config.rope, p.window)
    x, _, cache = _forward(config, p, x, attend_fn)
    return x, cache


# In the order of `_forward`; reports and budgets follow it.
SLOTS = (
    Slot("q", "attn_in", "attn_mid"),
    Slot("k", "attn_in", "attn_mid"),
    Slot("v", "attn_in", "attn_mid"),
    Slot("o", "attn_mid", "next"),
    Slot("gate", "mlp_in", "mlp_mid"),
    Slot("up", "mlp_in", "mlp_mid"),
    Slot("down", "mlp_mid", "next"),
)


# Cached by the static settings, so a program compiled for a model also serves the one pruned
# from it: jit compares functions by identity.
@functools.cache
def _functions(c: StaticConfig) -> tuple[Callable[..., Any], ...]:
    """Bind `block`, `head` and `step` to static settings."""
    return functools.partial(_block, c), functools.partial(_head, c), functools.partial(_step, c)


@functools.cache
def arch(config: Config) -> Arch:
    """Bind the family's functions to a configuration.

    Args:
      config: Configuration; equal ones give the same object.

    Returns:
      Architecture.
    """
    h = config.head_dim
    # A unit of the heads is one key-value head with the query heads that share it.
    shared = config.query_heads // config.kv_heads
    block, head, step = _functions(config.static)
    heads = Group(
        "heads",
        Member("o", 1, shared * h),
        (Member("q", 0, shared * h), Member("k", 0, h), Member("v", 0, h)),
    )
    # `up` is last: it is the linear path into the neurons, which `gate` only scales.
    neurons = Group("neurons", Member("down", 1, 1), (Member("gate", 0, 1), Member("up", 0, 1)))
    return Arch(config, _embed, block, head, step, SLOTS, (heads, neurons))
