"""The LLaMA family (LLaMA 1-3, Mistral, TinyLlama, SmolLM2, Qwen2) as pure functions over pytrees.

Touvron et al. 2023, with grouped-query attention (Ainslie et al. 2023). Biases are there when the checkpoint has them; head counts come
from the arrays, so a block may have fewer heads or neurons than its neighbours.
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
    """What the arrays cannot say. `windows` gives each block's sliding window (None: full attention), `biases` the slots that have one,
    `widths` each block's (key-value heads, neurons) where blocks differ, else ().
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
    def computed(self) -> "StaticConfig":
        """What of it the functions compute with."""
        return StaticConfig(self.head_dim, self.eps, self.act, self.rope)


class StaticConfig(NamedTuple):
    """The settings that the functions of an architecture depend on; all else of its configuration is in the shapes."""

    head_dim: int
    eps: float
    act: str
    rope: Rope


@struct.dataclass
class Block:
    """One decoder block's parameters. `window` is static: blocks that differ in it are two compilations."""

    attn_norm: Norm
    q: Linear  # [n*h d]
    k: Linear  # [k*h d]
    v: Linear  # [k*h d]
    o: Linear  # [d n*h]
    mlp_norm: Norm
    gate: Linear  # [f d]
    up: Linear  # [f d]
    down: Linear  # [d f]
    window: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class NonBlockParams:
    """Parameters outside the blocks. `head` is None when it is tied to the embedding."""

    embed: jax.Array  # [vocab d]
    norm: Norm
    head: Linear | None = None


def _embed(non_block: NonBlockParams, tokens: jax.Array, start: Start = 0) -> jax.Array:
    return non_block.embed[tokens]


def _head(config: StaticConfig, non_block: NonBlockParams, x: jax.Array) -> jax.Array:
    w = non_block.embed if non_block.head is None else non_block.head.w
    x = rms_norm(non_block.norm, x, config.eps)
    return jnp.einsum("btd,vd->btv", x, w, preferred_element_type=jnp.float32)


def _forward(
    config: StaticConfig, p: Block, x: jax.Array, mix: AttendFn[T]
) -> tuple[jax.Array, Taps, T]:
    """x [b t d] -> (x [b t d], taps, what `mix` keeps); taps hold each linear's input under its tap's name and its output under its own."""
    t: dict[str, jax.Array] = {}
    t["attn_in"] = rms_norm(p.attn_norm, x, config.eps)
    t["q"], t["k"], t["v"] = (
        linear(p.q, t["attn_in"]),
        linear(p.k, t["attn_in"]),
        linear(p.v, t["attn_in"]),
    )
    mixed, kept = mix(*(split_heads(t[name], config.head_dim) for name in "qkv"))
    t["attn_mid"] = mixed.reshape(*x.shape[:2], -1)
    t["o"] = linear(p.o, t["attn_mid"])
    x = x + t["o"]
    t["mlp_in"] = rms_norm(p.mlp_norm, x, config.eps)
    t["gate"], t["up"] = linear(p.gate, t["mlp_in"]), linear(p.up, t["mlp_in"])
    t["mlp_mid"] = ACTIVATIONS[config.act](t["gate"]) * t["up"]
    t["down"] = linear(p.down, t["mlp_mid"])
    return x + t["down"], t, kept


def _block(config: StaticConfig, p: Block, x: jax.Array) -> tuple[jax.Array, Taps]:
    x, taps, _ = _forward(
        config, p, x, lambda q, k, v: (attention(*rotate(config.rope, q, k), v, p.window), None)
    )
    return x, taps


def _step(
    config: StaticConfig, p: Block, x: jax.Array, cache: Cache, start: Start
) -> tuple[jax.Array, Cache]:
    x, _, cache = _forward(
        config, p, x, functools.partial(attend, cache, start, config.rope, p.window)
    )
    return x, cache


SLOTS = (
    Slot("q", "attn_in", "attn_mid"),
    Slot("k", "attn_in", "attn_mid"),
    Slot("v", "attn_in", "attn_mid"),
    Slot("o", "attn_mid", "next"),
    Slot("gate", "mlp_in", "mlp_mid"),
    Slot("up", "mlp_in", "mlp_mid"),
    Slot("down", "mlp_mid", "next"),
)


@functools.cache
def _functions(c: StaticConfig) -> tuple[Callable[..., Any], ...]:
    """`block`, `head` and `step`, the same objects for equal settings: what is compiled for a model serves the one pruned from it."""
    return functools.partial(_block, c), functools.partial(_head, c), functools.partial(_step, c)


@functools.cache
def arch(config: Config) -> Arch:
    """The family's functions with `config` bound; equal configurations give the same object."""
    shared, h = (
        config.query_heads // config.kv_heads,
        config.head_dim,
    )  # query heads of one key-value head
    block, head, step = _functions(config.computed)
    return Arch(
        config,
        _embed,
        block,
        head,
        step,
        SLOTS,
        (
            Group(
                "heads",
                Member("o", 1, shared * h),
                (Member("q", 0, shared * h), Member("k", 0, h), Member("v", 0, h)),
            ),
            Group("neurons", Member("down", 1, 1), (Member("gate", 0, 1), Member("up", 0, 1))),
        ),
    )
