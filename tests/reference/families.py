"""Tiny configurations of every family, with each switch on and off, for comparisons."""

from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
_YARN = {**_ROPE, "rope_type": "yarn", "factor": 4.0}
_LONGROPE = {
    **_ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _of(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_SIZES, **more}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama yarn": _of("llama", rope_parameters=_YARN),
    "qwen2 yarn": _of("qwen2", rope_parameters={**_YARN, "beta_fast": 8.0, "truncate": False}),
    "qwen3": _of("qwen3", head_dim=12),
    "qwen3 biased, sliding, yarn, tied": _of(
        "qwen3",
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        tie_word_embeddings=True,
        rope_parameters={**_YARN, "attention_factor": 1.2},
    ),
    "granite": _of(
        "granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        attention_bias=True,
        mlp_bias=True,
    ),
    "smollm3": _of("smollm3"),
    "smollm3 sliding, biased": _of(
        "smollm3",
        no_rope_layers=[1, 0, 0, 1],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "olmo2": _of("olmo2"),
    "olmo2 biased, tied": _of("olmo2", attention_bias=True, tie_word_embeddings=True),
    "phi": _of("phi", num_key_value_heads=6),
    "phi with norms": _of(
        "phi",
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        hidden_act="gelu",
    ),
    "phi3": _of("phi3"),
    "phi3 longrope, sliding": _of(
        "phi3",
        sliding_window=7,
        original_max_position_embeddings=16,
        rope_parameters=_LONGROPE,
        tie_word_embeddings=True,
    ),
    "phi3 partial longrope": _of(
        "phi3",
        hidden_size=96,
        num_attention_heads=6,
        original_max_position_embeddings=16,
        rope_parameters={
            **_LONGROPE,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
        },
    ),
    "gemma": _of("gemma", head_dim=12),
    "gemma biased": _of("gemma", head_dim=8, attention_bias=True, hidden_act="gelu"),
    "gemma2": _of("gemma2", head_dim=12, query_pre_attn_scalar=10, sliding_window=5),
    "gemma2 without caps": _of(
        "gemma2",
        head_dim=8,
        sliding_window=6,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention", "sliding_attention"] * 2,
        attention_bias=True,
    ),
    "gemma3": _of("gemma3_text", head_dim=12, sliding_window=5, query_pre_attn_scalar=10),
    "gemma3 scaled": _of(
        "gemma3_text",
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=_TWO_ROPES,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.0,
        tie_word_embeddings=False,
    ),
    "mixtral": _of("mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral sliding, tied": _of(
        "mixtral",
        head_dim=12,
        num_local_experts=3,
        num_experts_per_tok=3,
        sliding_window=5,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": _of(
        "qwen3_moe",
        moe_intermediate_size=56,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "qwen3_moe with dense blocks, biased, sliding": _of(
        "qwen3_moe",
        head_dim=12,
        moe_intermediate_size=56,
        num_experts=4,
        num_experts_per_tok=3,
        mlp_only_layers=[2],
        decoder_sparse_step=2,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
    ),
    "olmoe": _of("olmoe", num_experts=6, num_experts_per_tok=2),
    "olmoe clipped, biased": _of(
        "olmoe",
        num_experts=4,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        clip_qkv=0.7,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
}
