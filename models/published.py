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
    "OPT-350M": Published({**_opt(1024, 4096, 24, 16), **_OPT_350M}, 331_196_416),
    "OPT-66B": Published(_opt(9216, 36864, 64, 72), 65_719_701_504),
}
