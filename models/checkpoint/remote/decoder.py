"""Language model whose blocks differ in width, for transformers with trust_remote_code=True.

In config.json, `widths` has the key-value heads and neurons of each block and `biases` the linears
that have one. Everything else is transformers' own. Written by Topiary.
"""

import copy

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.versions import require_version

# Earlier ones take the number of heads from the configuration, for all blocks alike.
require_version("transformers>=4.48")


class PrunedConfig(LlamaConfig):
    """Configuration with `widths` and `biases`."""

    model_type = "topiary_llama"


class PrunedForCausalLM(LlamaForCausalLM):
    """Causal language model whose linears have the widths of their block."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        for layer, heads, neurons in zip(
            self.model.layers, config.widths["heads"], config.widths["neurons"], strict=True
        ):
            attention, dim = layer.self_attn, config.hidden_size
            kept = heads * attention.head_dim
            queries = kept * attention.num_key_value_groups
            outputs = dict.fromkeys(("k_proj", "v_proj"), kept) | {"q_proj": queries}
            outputs |= dict.fromkeys(("gate_proj", "up_proj", "fc1", "w1", "w3"), neurons)
            outputs |= {"qkv_proj": queries + 2 * kept, "gate_up_proj": 2 * neurons}
            inputs = dict.fromkeys(("o_proj", "dense"), queries)
            inputs |= dict.fromkeys(("down_proj", "fc2", "w2"), neurons)
            for name, _ in list(layer.named_modules()):
                kind = name.rpartition(".")[2]
                if kind in outputs or kind in inputs:
                    shape = inputs.get(kind, dim), outputs.get(kind, dim)
                    layer.set_submodule(name, nn.Linear(*shape, bias=name in config.biases))
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None and hasattr(experts, "gate_up_proj"):
                experts.intermediate_dim, count = neurons, len(experts.gate_up_proj)
                experts.gate_up_proj = nn.Parameter(torch.empty(count, 2 * neurons, dim))
                experts.down_proj = nn.Parameter(torch.empty(count, dim, neurons))
            if hasattr(attention, "qkv_proj"):
                # The queries, keys and values are told apart by these counts.
                attention.config = copy.copy(config)
                attention.config.num_attention_heads = heads * attention.num_key_value_groups
                attention.num_key_value_heads = heads
            for name, width in (("q_norm", queries), ("k_norm", kept)):
                norm = getattr(attention, name, None)
                # A norm over all heads together, not over each head's channels.
                if norm is not None and norm.weight.shape[0] != attention.head_dim:
                    norm.weight = nn.Parameter(torch.ones(width))


def _join_experts_as_stock() -> None:
    """Have transformers 5 read experts as it reads the stock type's, joined to one tensor."""
    try:
        from transformers import conversion_mapping as mapping
    except ImportError:  # transformers 4 has a module for each expert
        return
    stock = mapping.get_checkpoint_conversion_mapping(LlamaConfig.model_type)
    if stock:
        mapping.register_checkpoint_conversion_mapping(
            PrunedConfig.model_type, stock, overwrite=True
        )


_join_experts_as_stock()
