"""Names of tensors and settings that GGUF files of LLaMA-like models share, read and written."""

NON_BLOCK = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# Architecture whose head and neuron counts are lists with one entry a block.
RAGGED = "deci"
# Name of a special token in config.json -> name in the file.
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
