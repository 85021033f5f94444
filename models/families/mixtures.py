"""Configurations of mixtures of experts: Mixtral, Qwen3's and OLMoE."""

from collections.abc import Sequence
from typing import Any

from models import decoder_config
from models.errors import InputError
from models.experts import RouterConfig
from models.families.decoders import (
    ATTENTION_FLAG,
    LLAMA_LINEARS,
    PRE_NORMS,
    QK_NORMS,
    attention_biases,
    make_family,
    read_config,
)
from models.families.fields import REPAIR, Fields
from models.families.positions import DEFAULT_WINDOW, RopeDefaults, one_window
from models.families.specs import Names
from models.untrusted import is_count

EXPERTS = {name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
MIXTRAL_NAMES = Names(
    LLAMA_LINEARS,
    PRE_NORMS,
    router="block_sparse_moe.gate",
    experts={
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
    },
)
MOE_NAMES = Names(LLAMA_LINEARS, PRE_NORMS | QK_NORMS, router="mlp.gate", experts=EXPERTS)
# Two names of the number of experts: transformers 4 writes the first for Qwen3, 5 the second.
QWEN3_EXPERTS = ("num_experts", "num_local_experts")


def _router(f: Fields, experts: int, k: int, renormalise: bool) -> RouterConfig:
    """Read the settings of the routers; `k` is the family's default."""
    k = f.count("num_experts_per_tok", k)
    if k > experts:
        raise InputError(
            f"config.json: num_experts_per_tok={k} is more than the {experts} experts", REPAIR
        )
    return RouterConfig(k, renormalise)


def _mixtral(f: Fields) -> decoder_config.Config:
    experts = f.count("num_local_experts", 8)
    return read_config(
        f,
        MIXTRAL_NAMES,
        windows=one_window(f, None),
        eps=1e-5,
        kv_heads=8,
        rope_defaults=RopeDefaults(theta=1e6, longest=131072),
        static={"router": _router(f, experts, 2, renormalise=True)},
        experts=experts,
        expert_neurons=f.count("intermediate_size"),
        sparse=(True,) * f.count("num_hidden_layers"),
    )


def _qwen3_moe(f: Fields) -> decoder_config.Config:
    experts = f.count(next((n for n in QWEN3_EXPERTS if n in f.config), QWEN3_EXPERTS[0]), 128)
    blocks, step = f.count("num_hidden_layers"), f.count("decoder_sparse_step", 1)
    dense = f.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(is_count(i, 0) for i in dense):
        raise InputError("config.json: mlp_only_layers must be a list of block numbers", REPAIR)
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(blocks))
    router = _router(f, experts, 8, f.flag("norm_topk_prob", False))
    sliding = f.flag("use_sliding_window", False)
    if not any(sparse):
        raise InputError(
            "config.json: mlp_only_layers and decoder_sparse_step leave no block with experts",
            'give the model_type "qwen3"',
        )
    return read_config(
        f,
        MOE_NAMES,
        biases=attention_biases(f),
        windows=one_window(f, DEFAULT_WINDOW) if sliding else None,
        kv_heads=4,
        rope_defaults=RopeDefaults(longest=32768),
        qk_norm="head",
        static={"router": router},
        experts=experts,
        expert_neurons=f.count("moe_intermediate_size", 768),
        sparse=sparse,
    )


def _dense_blocks(c: decoder_config.Config, kept: Sequence[int]) -> dict[str, Any]:
    """Return the fields that say which of the blocks that stay have no experts."""
    dense = [new for new, old in enumerate(kept) if not c.sparse[old]]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _olmoe(f: Fields) -> decoder_config.Config:
    experts = f.count("num_experts", 64)
    router = _router(f, experts, 8, f.flag("norm_topk_prob", False))
    return read_config(
        f,
        MOE_NAMES,
        biases=attention_biases(f),
        eps=1e-5,
        rope_defaults=RopeDefaults(longest=4096),
        qk_norm="whole",
        static={"router": router, "qkv_cap": f.optional_number("clip_qkv")},
        experts=experts,
        expert_neurons=f.count("intermediate_size"),
        sparse=(True,) * f.count("num_hidden_layers"),
    )


def _heads_fill_norms(c: decoder_config.Config) -> bool:
    """Return True if OLMoE's norm of the queries, as wide as the hidden size, has all heads."""
    return c.query_heads * c.head_dim == c.dim


# model_type -> family.
MIXTURES = {
    "mixtral": make_family(
        "Mixtral",
        MIXTRAL_NAMES,
        _mixtral,
        expert_neurons="intermediate_size",
        experts=("num_local_experts",),
    ),
    "qwen3_moe": make_family(
        "Qwen3Moe",
        MOE_NAMES,
        _qwen3_moe,
        bias_flags=ATTENTION_FLAG,
        expert_neurons="moe_intermediate_size",
        experts=QWEN3_EXPERTS,
        renumber=_dense_blocks,
    ),
    "olmoe": make_family(
        "Olmoe",
        MOE_NAMES,
        _olmoe,
        bias_flags=ATTENTION_FLAG,
        can_hold=_heads_fill_norms,
        expert_neurons="intermediate_size",
        experts=("num_experts",),
    ),
}
