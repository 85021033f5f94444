"""The OPT family (Zhang et al. 2022) as pure functions over pytrees: pre- and post-norm, projected word embeddings, ReLU and GELU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from models.arch import Arch, Group, Member, Slot, Taps
from models.cache import AttendFn, Cache, Start, T, attend
from models.layers import ACTIVATIONS, Linear, Norm, attention, layer_norm, linear, split_heads

POSITION_OFFSET = (
    2  # the first two rows of the position table are never read: a relic of padding in fairseq
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the arrays cannot say. `pre_norm` is False in OPT-350m alone; `biases` are the slots that have one, `widths` each block's
    (heads, neurons) where blocks differ, else ().
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
    def computed(self) -> "StaticConfig":
        """What of it the functions compute with."""
        return StaticConfig(self.head_dim, self.act, self.pre_norm)


class StaticConfig(NamedTuple):
    """The settings that the functions of an architecture depend on; all else of its configuration is in the shapes."""

    head_dim: int
    act: str
    pre_norm: bool


@struct.dataclass
class Block:
    """One decoder block's parameters."""

    attn_norm: Norm
    q: Linear  # [d d]
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    fc1: Linear  # [f d]
    fc2: Linear  # [d f]


@struct.dataclass
class NonBlockParams:
    """Parameters outside the blocks. `norm` is None in post-norm models, the projections where word and hidden sizes agree."""

    embed: jax.Array  # [vocab word_dim]
    positions: jax.Array  # [positions + 2, d]
    norm: Norm | None = None
    project_in: Linear | None = None  # [d word_dim]
    project_out: Linear | None = None  # [word_dim d]
    head: Linear | None = None


def _embed(non_block: NonBlockParams, tokens: jax.Array, start: Start = 0) -> jax.Array:
    x = non_block.embed[tokens]
    if non_block.project_in is not None:
        x = linear(non_block.project_in, x)
    return (
        x
        + jax.lax.dynamic_slice_in_dim(
            non_block.positions, POSITION_OFFSET + start, tokens.shape[1]
        )[None]
    )


def _head(non_block: NonBlockParams, x: jax.Array) -> jax.Array:
    if non_block.norm is not None:
        x = layer_norm(non_block.norm, x)
    if non_block.project_out is not None:
        x = linear(non_block.project_out, x)
    w = non_block.embed if non_block.head is None else non_block.head.w
    return jnp.einsum("btd,vd->btv", x, w, preferred_element_type=jnp.float32)


def _forward(
    config: StaticConfig, p: Block, x: jax.Array, mix: AttendFn[T]
) -> tuple[jax.Array, Taps, T]:
    """x [b t d] -> (x [b t d], taps, what `mix` keeps); taps hold each linear's input under its tap's name and its output under its own."""
    t: dict[str, jax.Array] = {}
    t["attn_in"] = layer_norm(p.attn_norm, x) if config.pre_norm else x
    t["q"], t["k"], t["v"] = (
        linear(p.q, t["attn_in"]),
        linear(p.k, t["attn_in"]),
        linear(p.v, t["attn_in"]),
    )
    mixed, kept = mix(*(split_heads(t[name], config.head_dim) for name in "qkv"))
    t["attn_mid"] = mixed.reshape(*x.shape[:2], -1)
    t["o"] = linear(p.o, t["attn_mid"])
    x = x + t["o"]
    x = x if config.pre_norm else layer_norm(p.attn_norm, x)
    t["mlp_in"] = layer_norm(p.mlp_norm, x) if config.pre_norm else x
    t["fc1"] = linear(p.fc1, t["mlp_in"])
    t["mlp_mid"] = ACTIVATIONS[config.act](t["fc1"])
    t["fc2"] = linear(p.fc2, t["mlp_mid"])
    x = x + t["fc2"]
    return (x if config.pre_norm else layer_norm(p.mlp_norm, x)), t, kept


def _block(config: StaticConfig, p: Block, x: jax.Array) -> tuple[jax.Array, Taps]:
    x, taps, _ = _forward(config, p, x, lambda q, k, v: (attention(q, k, v, None), None))
    return x, taps


def _step(
    config: StaticConfig, p: Block, x: jax.Array, cache: Cache, start: Start
) -> tuple[jax.Array, Cache]:
    x, _, cache = _forward(config, p, x, functools.partial(attend, cache, start, None, None))
    return x, cache


SLOTS = (
    Slot("k", "attn_in", "attn_mid"),
    Slot("v", "attn_in", "attn_mid"),
    Slot("q", "attn_in", "attn_mid"),
    Slot("o", "attn_mid", "next"),
    Slot("fc1", "mlp_in", "mlp_mid"),
    Slot("fc2", "mlp_mid", "next"),
)


@functools.cache
def _functions(c: StaticConfig) -> tuple[Callable[..., Any], ...]:
    """`block` and `step`, the same objects for equal settings: what is compiled for a model serves the one pruned from it."""
    return functools.partial(_block, c), functools.partial(_step, c)


@functools.cache
def arch(config: Config) -> Arch:
    """The family's functions with `config` bound; equal configurations give the same object."""
    h = config.head_dim
    block, step = _functions(config.computed)
    return Arch(
        config,
        _embed,
        block,
        _head,
        step,
        SLOTS,
        (
            Group(
                "heads",
                Member("o", 1, h),
                (Member("q", 0, h), Member("k", 0, h), Member("v", 0, h)),
            ),
            Group("neurons", Member("fc2", 1, 1), (Member("fc1", 0, 1),)),
        ),
        residual=config.pre_norm,
    )
