"""A LLaMA-family model whose blocks differ in width. `widths` in config.json has each block's key-value heads and neurons, `biases` the
linears that have one; everything else is transformers' own. Written by Topiary; load it with trust_remote_code=True."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class PrunedConfig(LlamaConfig):
    model_type = "topiary_llama"


class PrunedForCausalLM(LlamaForCausalLM):
    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        for layer, heads, neurons in zip(
            self.model.layers, config.widths["heads"], config.widths["neurons"], strict=True
        ):
            kept = heads * layer.self_attn.head_dim
            queries = kept * layer.self_attn.num_key_value_groups
            shapes = {
                f"self_attn.{n}_proj": (config.hidden_size, out)
                for n, out in (("q", queries), ("k", kept), ("v", kept))
            }
            shapes |= {f"mlp.{n}_proj": (config.hidden_size, neurons) for n in ("gate", "up")}
            shapes |= {
                "self_attn.o_proj": (queries, config.hidden_size),
                "mlp.down_proj": (neurons, config.hidden_size),
            }
            for name, shape in shapes.items():
                layer.set_submodule(name, nn.Linear(*shape, bias=name in config.biases))
