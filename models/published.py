"""Configurations of published models, with the parameter counts that their pages state."""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A published model.

    Attributes:
      config: Contents of its `config.json`.
      parameters: Number of parameters that its page states.
    """

    config: dict[str, Any]
    parameters: int


_LLAMA2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
_OPT = {
    "model_type": "opt",
    "activation_function": "relu",
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "vocab_size": 50272,
}


_LLAMA3 = {**_LLAMA2, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
_MISTRAL = {
    **_LLAMA2,
    "model_type": "mistral",
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
_QWEN2 = {
    **_LLAMA2,
    "model_type": "qwen2",
    "max_position_embeddings": 131072,
    "max_window_layers": 24,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 512}


_QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
_PHI2 = {
    "model_type": "phi",
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 51200,
}
_PHI3 = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
_PHI4 = {
    **_PHI3,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000,
    "sliding_window": None,
    "vocab_size": 100352,
}
_GEMMA2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}
_OLMO2 = {
    "model_type": "olmo2",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "vocab_size": 100352,
}
_SMOLLM3 = {
    "model_type": "smollm3",
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "vocab_size": 128256,
}


_MIXTRAL = {
    **_LLAMA2,
    "model_type": "mixtral",
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
}
_QWEN3_MOE = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_OLMOE = {
    "model_type": "olmoe",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 50304,
}


def _llama(
    base: dict[str, Any], dim: int, ffn: int, blocks: int, heads: int, kv: int
) -> dict[str, Any]:
    sizes = {"hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": blocks}
    return {**base, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv}


def _opt(dim: int, ffn: int, blocks: int, heads: int) -> dict[str, Any]:
    sizes = {
        "hidden_size": dim,
        "ffn_dim": ffn,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
    }
    return {**_OPT, **sizes, "do_layer_norm_before": True, "word_embed_proj_dim": dim}


MODELS = {
    "LLaMA-2-7B": Published(_llama(_LLAMA2, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "LLaMA-2-13B": Published(_llama(_LLAMA2, 5120, 13824, 40, 40, 40), 13_015_864_320),
    "LLaMA-2-70B": Published(_llama(_LLAMA2, 8192, 28672, 80, 64, 8), 68_976_648_192),
    "Llama-3-8B": Published(_llama(_LLAMA3, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "Mistral-7B": Published(_llama(_MISTRAL, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2-0.5B": Published(_llama(_QWEN2, 896, 4864, 24, 14, 2), 494_032_768),
    "Qwen3-0.6B": Published(
        _llama({**_QWEN3, "tie_word_embeddings": True}, 1024, 3072, 28, 16, 8), 596_049_920
    ),
    "Qwen3-8B": Published(_llama(_QWEN3, 4096, 12288, 36, 32, 8), 8_190_735_360),
    "Phi-2": Published(_llama(_PHI2, 2560, 10240, 32, 32, 32), 2_779_683_840),
    "Phi-3-mini": Published(_llama(_PHI3, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "Phi-4": Published(_llama(_PHI4, 5120, 17920, 40, 40, 10), 14_659_507_200),
    "Gemma-2-9B": Published(_llama(_GEMMA2, 3584, 14336, 42, 16, 8), 9_241_705_984),
    # Its text part; the page counts the vision tower too.
    "Gemma-3-4B": Published(_llama(_GEMMA3, 2560, 10240, 34, 8, 4), 3_880_263_168),
    "OLMo-2-7B": Published(_llama(_OLMO2, 4096, 11008, 32, 32, 32), 7_298_617_344),
    "SmolLM3-3B": Published(_llama(_SMOLLM3, 2048, 11008, 36, 16, 4), 3_075_098_624),
    "Mixtral-8x7B": Published(_llama(_MIXTRAL, 4096, 14336, 32, 32, 8), 46_702_792_704),
    "Qwen3-30B-A3B": Published(_llama(_QWEN3_MOE, 2048, 6144, 48, 32, 4), 30_532_122_624),
    "OLMoE-1B-7B": Published(_llama(_OLMOE, 2048, 1024, 16, 16, 16), 6_919_161_856),
    "OPT-350M": Published({**_opt(1024, 4096, 24, 16), **_OPT_350M}, 331_196_416),
    "OPT-66B": Published(_opt(9216, 36864, 64, 72), 65_719_701_504),
}
