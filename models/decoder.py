"""Decoder of the families with rotary positions, as pure functions over pytrees.

One forward serves them all: LLaMA, Mistral, Qwen2 and 3, Granite, SmolLM3, Phi, Phi-3 and 4, Gemma
1 to 3, OLMo2, and the mixtures of experts Mixtral, Qwen3-MoE and OLMoE. Static switches say where
norms are, whether the two branches run in parallel, what is scaled and capped; biases, gate, norms
and experts are there when a block has them. `models.families` reads a `config.json` into the
switches. Head counts come from the arrays, so a block may have fewer heads or neurons than its
neighbours.

Source: Touvron et al. 2023, with grouped-query attention (Ainslie et al. 2023); Gemma Team 2024
(soft caps, norms after branches); OLMo et al. 2025 (norms of queries and keys).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.arch import Arch, Group, Member, Slot, Taps
from models.attention import AttentionSettings, attention
from models.cache import AttendFn, Cache, Start, T, attend
from models.decoder_config import Config, StaticConfig
from models.experts import Expert, run_experts
from models.layers import ACTIVATIONS, Linear, Norm, layer_norm, linear, rms_norm, split_heads
from models.precision import product
from models.rescale import rescale_block
from models.rotary import Rope, rotate


class Block(struct.PyTreeNode):
    """Parameters of one decoder block.

    Letters: d hidden size, n query heads, k key-value heads, h head size, f neurons.

    Attributes:
      attn_norm: Norm before attention, [d]; None without one.
      q: Query projection, [n*h d].
      k: Key projection, [k*h d].
      v: Value projection, [k*h d].
      o: Output projection, [d n*h].
      mlp_norm: Norm before the feed-forward part, [d]; None without one.
      gate: Gate projection, [f d]; None without a gate.
      up: Up projection, [f d]; None where the block has experts.
      down: Down projection, [d f]; None where the block has experts.
      q_norm: Norm of the queries, [h] for each head alike or [n*h]; None without one.
      k_norm: Norm of the keys, [h] or [k*h]; None without one.
      attn_out_norm: Norm of the attention branch's output, [d]; None without one.
      mlp_out_norm: Norm of the feed-forward branch's output, [d]; None without one.
      window: Sliding window in positions, None for full attention. It is static, so blocks that
        differ in it are compiled separately.
      rope: Rotary settings, None without rotary positions. Static too.
      router: Projection to the weights of the experts, [e d]; None without experts.
      experts: Experts of the block, empty without them.
    """

    attn_norm: Norm | None
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm | None
    gate: Linear | None
    up: Linear | None
    down: Linear | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attn_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    window: int | None = struct.field(pytree_node=False, default=None)
    rope: Rope | None = struct.field(pytree_node=False, default=None)
    router: Linear | None = None
    experts: tuple[Expert, ...] = ()


class NonBlockParams(struct.PyTreeNode):
    """Parameters outside the blocks.

    Attributes:
      embed: Token embedding, [vocab d].
      norm: Final norm, [d].
      head: Output head, [vocab d]; None where the embedding serves as the head.
    """

    embed: jax.Array
    norm: Norm
    head: Linear | None = None


def _normalise(config: StaticConfig, p: Norm | None, x: jax.Array) -> jax.Array:
    """Apply a norm of the model's kind over the last axis; None leaves the input as it is."""
    if p is None:
        return x
    if config.norm == "layer":
        return layer_norm(p, x, config.eps)
    return rms_norm(
        p,
        x,
        config.eps,
        offset=1.0 if config.norm == "rms_offset" else 0.0,
        scale_in_float32=config.norm != "rms",
    )


def _embed(
    config: StaticConfig, non_block: NonBlockParams, tokens: jax.Array, start: Start = 0
) -> jax.Array:
    # Positions enter in the blocks, so `start` has no effect here.
    x = non_block.embed[tokens]
    if config.embed_scale == 1.0:
        return x
    if config.embed_scale_rounded:
        return x * jnp.asarray(config.embed_scale, x.dtype)
    return (x.astype(jnp.float32) * config.embed_scale).astype(x.dtype)


def _head(config: StaticConfig, non_block: NonBlockParams, x: jax.Array) -> jax.Array:
    head = non_block.head
    w = non_block.embed if head is None else head.w
    x = _normalise(config, non_block.norm, x)
    # float32 logits from a product in the model's dtype: the loss sums over a whole vocabulary.
    logits = product("btd,vd->btv", x, w, preferred_element_type=jnp.float32)
    if head is not None and head.b is not None:
        logits = logits + head.b.astype(jnp.float32)[None, None]
    if config.logits_divisor != 1.0:
        logits = logits / config.logits_divisor
    if config.logits_cap is not None:
        logits = config.logits_cap * jnp.tanh(logits / config.logits_cap)
    return logits


def _heads(config: StaticConfig, norm: Norm | None, x: jax.Array) -> jax.Array:
    """Split queries or keys [b t n*h] by head, normalised if the block does that."""
    # One gain for each channel of all heads: the mean square is over all of them. At one head the
    # two kinds are the same.
    if norm is not None and norm.scale is not None and norm.scale.shape[0] != config.head_dim:
        return split_heads(_normalise(config, norm, x), config.head_dim)
    return _normalise(config, norm, split_heads(x, config.head_dim))


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
    taps: dict[str, Any] = {}
    with jax.named_scope("attention_norm"):
        taps["attn_in"] = _normalise(config, p.attn_norm, x)
    with jax.named_scope("qkv_projections"):
        # Three products rather than one fused: each linear is pruned and cut by itself.
        taps["q"] = linear(p.q, taps["attn_in"])
        taps["k"] = linear(p.k, taps["attn_in"])
        taps["v"] = linear(p.v, taps["attn_in"])
    with jax.named_scope("attention"):
        q, k = _heads(config, p.q_norm, taps["q"]), _heads(config, p.k_norm, taps["k"])
        v = split_heads(taps["v"], config.head_dim)
        if config.qkv_cap is not None:
            q, k, v = (jnp.clip(a, -config.qkv_cap, config.qkv_cap) for a in (q, k, v))
        values, state = attend_fn(q, k, v)
        # The width follows from the heads that this block still has.
        taps["attn_mid"] = values.reshape(*x.shape[:2], -1)
    with jax.named_scope("attention_output"):
        taps["o"] = linear(p.o, taps["attn_mid"])
        x = _add_branch(config, x, _normalise(config, p.attn_out_norm, taps["o"]))
    with jax.named_scope("feed_forward_norm"):
        # Phi's branches share one norm, and the second does not see the first one's output.
        into = taps["attn_in"] if config.parallel else _normalise(config, p.mlp_norm, x)
        taps["mlp_in"] = into
    with jax.named_scope("feed_forward"):
        y = _feed_forward(config, p, into, taps)
        x = _add_branch(config, x, _normalise(config, p.mlp_out_norm, y))
    return x, taps, state


def _feed_forward(config: StaticConfig, p: Block, x: jax.Array, taps: dict[str, Any]) -> jax.Array:
    """Run the feed-forward part or the experts over x [b t d], and add their taps to `taps`."""
    act = ACTIVATIONS[config.act]
    if p.router is not None:
        assert config.router is not None
        y, routed = run_experts(config.router, p.router, p.experts, act, x)
        taps |= {f"experts.{name}": tap for name, tap in routed.items()}
        return y
    assert p.up is not None and p.down is not None
    taps["up"] = linear(p.up, x)
    if p.gate is None:
        taps["mlp_mid"] = act(taps["up"])
    else:
        taps["gate"] = linear(p.gate, x)
        taps["mlp_mid"] = act(taps["gate"]) * taps["up"]
    taps["down"] = linear(p.down, taps["mlp_mid"])
    return taps["down"]


def _add_branch(config: StaticConfig, x: jax.Array, branch: jax.Array) -> jax.Array:
    """Add the output of a branch to the residual stream, both [b t d]."""
    return x + (branch if config.branch_scale == 1.0 else branch * config.branch_scale)


def _attention_settings(config: StaticConfig, p: Block) -> AttentionSettings:
    return AttentionSettings(p.window, config.attention_scale, config.attention_cap)


def _block(config: StaticConfig, p: Block, x: jax.Array) -> tuple[jax.Array, Taps]:
    def attend_all(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        if p.rope is not None:
            q, k = rotate(p.rope, q, k)
        return attention(q, k, v, _attention_settings(config, p)), None

    x, taps, _ = _forward(config, p, x, attend_all)
    return x, taps


def _step(
    config: StaticConfig, p: Block, x: jax.Array, cache: Cache, start: Start
) -> tuple[jax.Array, Cache]:
    settings = _attention_settings(config, p)
    attend_fn = functools.partial(attend, cache, start, p.rope, settings)
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


def _slots(config: Config) -> tuple[Slot, ...]:
    """Return the prunable linears of the blocks, those of experts last."""
    absent: tuple[str, ...] = () if config.gated else ("gate",)
    if config.sparse and all(config.sparse):
        absent = ("gate", "up", "down")
    slots = tuple(s for s in SLOTS if s.name not in absent)
    if config.static.parallel:
        # Both branches read one tap, so they share its statistics.
        slots = tuple(s._replace(reads="attn_in") if s.reads == "mlp_in" else s for s in slots)
    return slots + tuple(
        slot
        for part in (f"experts.{e}." for e in range(config.experts))
        for slot in (
            Slot(f"{part}gate", f"{part}in", f"{part}mid", "mlp_in"),
            Slot(f"{part}up", f"{part}in", f"{part}mid", "mlp_in"),
            Slot(f"{part}down", f"{part}mid", "next"),
        )
    )


def _groups(config: Config) -> tuple[Group, ...]:
    """Return the coupled channels of the blocks, those of experts last."""
    h = config.head_dim
    # A unit of the heads is one key-value head with the query heads that share it.
    shared = config.query_heads // config.kv_heads
    q, k = Member("q", 0, shared * h), Member("k", 0, h)
    whole = config.qk_norm == "whole"
    heads = Group(
        "heads",
        Member("o", 1, shared * h),
        (q, k, Member("v", 0, h)),
        # One over each head's channels is shared by all heads, so it stays whole.
        norms=(q._replace(name="q_norm"), k._replace(name="k_norm")) if whole else (),
    )
    # `up` is last: it is the linear path into the neurons, which `gate` only scales.
    writers = ("gate", "up") if config.gated else ("up",)

    def neurons(part: str = "") -> Group:
        reader = Member(f"{part}down", 1, 1)
        return Group(f"{part}neurons", reader, tuple(Member(part + n, 0, 1) for n in writers))

    dense = () if config.sparse and all(config.sparse) else (neurons(),)
    return (heads, *dense, *(neurons(f"experts.{e}.") for e in range(config.experts)))


# Cached by the static settings, so a program compiled for a model also serves the one pruned
# from it: jit compares functions by identity.
@functools.cache
def _functions(c: StaticConfig) -> tuple[Callable[..., Any], ...]:
    """Bind `embed`, `block`, `head`, `step` and `rescale` to static settings."""
    return tuple(functools.partial(f, c) for f in (_embed, _block, _head, _step, rescale_block))


@functools.cache
def arch(config: Config) -> Arch:
    """Bind the functions to a configuration.

    Args:
      config: Configuration; equal ones give the same object.

    Returns:
      Architecture.
    """
    embed, block, head, step, rescale = _functions(config.static)
    return Arch(
        config,
        embed,
        block,
        head,
        step,
        _slots(config),
        _groups(config),
        branch_norms=config.branch_norms,
        branch_scale=config.static.branch_scale,
        rescale=rescale,
    )
