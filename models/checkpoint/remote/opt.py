"""OPT model whose blocks differ in width, for transformers with trust_remote_code=True.

In config.json, `widths` has the heads and neurons of each block and `biases` the linears that have
one. Everything else is transformers' own. Written by Topiary.
"""

from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.utils.versions import require_version

# Earlier ones take the width of attention from the configuration, for all blocks alike.
require_version("transformers>=4.48")


class PrunedConfig(OPTConfig):
    """Configuration with `widths` and `biases`."""

    model_type = "topiary_opt"


class PrunedForCausalLM(OPTForCausalLM):
    """Causal language model whose linears have the widths of their block."""

    config_class = PrunedConfig

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        for layer, heads, neurons in zip(
            self.model.decoder.layers, config.widths["heads"], config.widths["neurons"], strict=True
        ):
            kept = heads * layer.self_attn.head_dim
            layer.self_attn.num_heads = heads
            shapes = {f"self_attn.{n}_proj": (config.hidden_size, kept) for n in "qkv"}
            shapes |= {"self_attn.out_proj": (kept, config.hidden_size)}
            shapes |= {"fc1": (config.hidden_size, neurons), "fc2": (neurons, config.hidden_size)}
            for name, shape in shapes.items():
                layer.set_submodule(name, nn.Linear(*shape, bias=name in config.biases))
