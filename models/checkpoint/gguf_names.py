"""Architectures of GGUF files: how llama.cpp's form of a model differs from the checkpoint's.

One table describes them, read and written. The parts of a block have one name in all files.

Source: llama.cpp's converters (`conversion/`) and graphs (`src/models/`), and the `gguf` package's
`MODEL_TENSORS`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from models.checkpoint.fused import stored_name
from models.families.gemma import GEMMA2_NAMES, GEMMA3_NAMES
from models.families.llama import LLAMA_NAMES, OLMO2_NAMES, QWEN3_NAMES
from models.families.phi import PHI3_NAMES, PHI_NAMES
from models.families.specs import Names

# Fields of `decoder.Block` and `decoder.NonBlockParams` -> names in the file.
LINEARS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
NORMS = {
    "attn_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_out_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_out_norm": "post_ffw_norm",
}
NON_BLOCK = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
# Settings in the file -> fields of `decoder_config.StaticConfig`.
NUMBERS = {
    "attention.scale": "attention_scale",
    "embedding_scale": "embed_scale",
    "residual_scale": "branch_scale",
    "logit_scale": "logits_divisor",
    "attn_logit_softcapping": "attention_cap",
    "final_logit_softcapping": "logits_cap",
}
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Architecture whose head and neuron counts are lists with one entry a block.
RAGGED = "deci"
# Name of a special token in config.json -> name in the file.
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


class Sliding(NamedTuple):
    """Rule of the blocks with a window where the file has none.

    Attributes:
      period: Every such block from the first has full attention; 0 if none has.
      window: Window in positions; None for full attention everywhere.
      held: False if Topiary's model of the type has no windows.
    """

    period: int
    window: int | None = None
    held: bool = True


class Architecture(NamedTuple):
    """Form of a model in GGUF files of one architecture.

    Attributes:
      model_type: Stock type of the checkpoint.
      names: Names in the checkpoint.
      eps: Field of `config.json` and setting in the file of the norms' constant.
      numbers: Further fields of `config.json` -> the setting in the file, and the value where the
        file has none or 0; None is null, for an attention's scale that of the size of a head.
      act: Activation that llama.cpp computes.
      act_field: Field of `config.json` that names it.
      permuted: True if rows of queries and keys are ordered for rotary pairs of neighbours.
      norm_offset: Number by which the file's norms exceed the checkpoint's.
      fused: Parts of a file that hold several linears, one below the other.
      partial: True if only the first channels of a head may be rotated.
      sliding: Rule of the windows; None without any.
      wide_blocks: Number of blocks at which attention is scaled for hidden size / heads, at every
        other one for the size of a head; None where a setting says the scale.
      local_rope: True if blocks with a window have a rotary base of their own.
      unrotated: Every such block has no rotary positions; 0 if all have.
      whole_heads: True if llama.cpp takes only heads that make up the hidden size.
      biases: Slots of which llama.cpp reads a bias.
      tied: True if llama.cpp takes only the embedding as the head, False if only another matrix;
        None for either.
    """

    model_type: str
    names: Names
    eps: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    numbers: Mapping[str, tuple[str, float | None]] = {}
    act: str = "silu"
    act_field: str = "hidden_act"
    permuted: bool = False
    norm_offset: float = 0.0
    fused: Mapping[str, tuple[str, ...]] = {}
    partial: bool = False
    sliding: Sliding | None = None
    wide_blocks: int | None = None
    local_rope: bool = False
    unrotated: int = 0
    whole_heads: bool = False
    biases: tuple[str, ...] = ("q", "k", "v")
    tied: bool | None = None

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return the slots that each part of a block in the file holds."""
        linears = self.names.linears
        # A slot whose checkpoint tensor is fused is fused in the file too.
        alone = [s for s in linears if stored_name(linears[s]) == linears[s]]
        parts = {LINEARS[s]: (s,) for s in alone} | {NORMS[s]: (s,) for s in self.names.norms}
        return parts | dict(self.fused)

    def module(self, slot: str) -> str:
        """Return the checkpoint's module of a slot.

        Args:
          slot: Field of a block, or of the parameters outside the blocks.
        """
        outside = {
            "embed": "model.embed_tokens",
            "norm": self.names.final_norm,
            "head": "lm_head",
        }
        modules = {**self.names.linears, **self.names.norms, **outside}
        return stored_name(modules[slot])


_QKV = {"attn_qkv": ("q", "k", "v")}
_LLAMA = Architecture("llama", LLAMA_NAMES, permuted=True, biases=tuple(LINEARS))
_GEMMA = Architecture("gemma", LLAMA_NAMES, act="gelu_pytorch_tanh", norm_offset=1.0, tied=True)
_GEMMA2 = _GEMMA._replace(
    model_type="gemma2",
    names=GEMMA2_NAMES,
    act_field="hidden_activation",
    numbers={
        "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": ("final_logit_softcapping", 30.0),
    },
    sliding=Sliding(2, 4096),
    wide_blocks=46,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": Architecture("qwen2", LLAMA_NAMES, whole_heads=True),
    "qwen3": Architecture("qwen3", QWEN3_NAMES),
    "granite": _LLAMA._replace(
        model_type="granite",
        numbers={
            "embedding_multiplier": ("embedding_scale", 1.0),
            "attention_multiplier": ("attention.scale", None),
            "residual_multiplier": ("residual_scale", 1.0),
            "logits_scaling": ("logit_scale", 1.0),
        },
    ),
    # llama.cpp has no setting for the blocks without rotary positions.
    "smollm3": _LLAMA._replace(model_type="smollm3", unrotated=4, biases=("q", "k", "v")),
    # Files of OLMo 3 have the same architecture, and windows.
    "olmo2": Architecture(
        "olmo2",
        OLMO2_NAMES,
        sliding=Sliding(4, held=False),
        whole_heads=True,
        biases=(),
        tied=False,
    ),
    "phi2": Architecture(
        "phi",
        PHI_NAMES,
        eps=("layer_norm_eps", "attention.layer_norm_epsilon"),
        act="gelu_new",
        # Files of the first converters; newer ones have the three apart.
        fused=_QKV,
        partial=True,
        whole_heads=True,
        biases=tuple(LINEARS),
        tied=False,
    ),
    "phi3": Architecture(
        "phi3",
        PHI3_NAMES,
        fused=_QKV | {"ffn_up": ("gate", "up")},
        partial=True,
        sliding=Sliding(0),
        whole_heads=True,
        biases=(),
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2._replace(
        model_type="gemma3_text",
        names=GEMMA3_NAMES,
        numbers={"final_logit_softcapping": ("final_logit_softcapping", None)},
        sliding=Sliding(6),
        wide_blocks=62,
        local_rope=True,
        tied=None,
    ),
    # LLaMA with blocks that differ in width or lack a part.
    RAGGED: _LLAMA,
}
