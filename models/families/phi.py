"""Configurations of Phi: Phi-1.5 and 2 (`phi`), Phi-3, Phi-4 and Phi-4-mini (`phi3`)."""

from models import decoder_config
from models.families.decoders import PRE_NORMS, make_family, read_config
from models.families.fields import Fields
from models.families.positions import RopeDefaults, one_window
from models.families.specs import Names

_PHI_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_PHI3_LINEARS = {
    "q": "self_attn.qkv_proj[q]",
    "k": "self_attn.qkv_proj[k]",
    "v": "self_attn.qkv_proj[v]",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_up_proj[gate]",
    "up": "mlp.gate_up_proj[up]",
    "down": "mlp.down_proj",
}
PHI_NAMES = Names(
    _PHI_LINEARS,
    {
        "attn_norm": "input_layernorm",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
    },
    final_norm="model.final_layernorm",
)


def _phi(f: Fields) -> decoder_config.Config:
    return read_config(
        f,
        PHI_NAMES,
        biases=tuple(_PHI_LINEARS),
        eps=1e-5,
        eps_field="layer_norm_eps",
        act="gelu_new",
        rope_defaults=RopeDefaults(share=0.5),
        static={"norm": "layer", "parallel": True},
        gated=False,
        qk_norm="head" if f.flag("qk_layernorm", False) else "",
        head_bias=True,
    )


PHI3_NAMES = Names(_PHI3_LINEARS, PRE_NORMS)


def _phi3(f: Fields) -> decoder_config.Config:
    # Files of before transformers 4.43 call longrope by these names.
    old = {"su": "longrope", "yarn": "longrope"}
    rope = RopeDefaults(share=1.0, old_names=old, original=4096, longest=4096)
    return read_config(f, PHI3_NAMES, windows=one_window(f, None), eps=1e-5, rope_defaults=rope)


def _heads_have_stock_size(c: decoder_config.Config) -> bool:
    # Phi's norms of queries and keys, and Phi-3's check of longrope's factors, ignore head_dim.
    ignores = bool(c.qk_norm) or c.rope.kind == "longrope"
    return not ignores or c.dim // c.query_heads == c.head_dim


# model_type -> family.
PHIS = {
    "phi": make_family("Phi", PHI_NAMES, _phi, can_hold=_heads_have_stock_size),
    "phi3": make_family("Phi3", PHI3_NAMES, _phi3, can_hold=_heads_have_stock_size),
}
