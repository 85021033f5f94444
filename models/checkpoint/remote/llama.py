"""LLaMA-family model whose blocks differ in width, for transformers with trust_remote_code=True.

In config.json, `widths` has the key-value heads and neurons of each block and `biases` the linears
that have one. Everything else is transformers' own. Written by Topiary.
"""

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
