"""Configurations of Gemma, Gemma 2 and the text part of Gemma 3."""

from typing import Any

from models import decoder_config
from models.decoder_config import NormKind
from models.errors import InputError
from models.families.decoders import (
    ATTENTION_FLAG,
    LLAMA_LINEARS,
    PRE_NORMS,
    QK_NORMS,
    attention_biases,
    heads_divide,
    layer_types,
    make_family,
    read_config,
)
from models.families.fields import Fields
from models.families.positions import (
    DEFAULT_WINDOW,
    RopeDefaults,
    read_layer_types,
    rope_of,
    windows_by_type,
)
from models.families.specs import Names

_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
GEMMA_NAMES = Names(LLAMA_LINEARS, PRE_NORMS)


def _gemma_fields(f: Fields) -> dict[str, Any]:
    """Return what all Gemma families share; InputError for a model that is no decoder."""
    if f.flag("use_bidirectional_attention", False):
        raise InputError(
            "config.json: use_bidirectional_attention=true is not supported",
            "such a model embeds texts and predicts no tokens",
        )
    return {
        "biases": attention_biases(f),
        "tied": True,
        "act": "gelu_pytorch_tanh",
        "head_dim": 256,
    }


def _gemma_static(f: Fields, **more: Any) -> dict[str, Any]:
    norm: NormKind = "rms_offset"
    scale = float(f.count("hidden_size")) ** 0.5
    return {"norm": norm, "embed_scale": scale, "embed_scale_rounded": True, **more}


def _gemma(f: Fields) -> decoder_config.Config:
    # The first files say "gelu" and mean its tanh form, as transformers reads them.
    if f.config.get("hidden_act") == "gelu":
        f = Fields({**f.config, "hidden_act": "gelu_pytorch_tanh"})
    return read_config(
        f,
        GEMMA_NAMES,
        kv_heads=16,
        rope_defaults=RopeDefaults(longest=8192),
        static=_gemma_static(f),
        **_gemma_fields(f),
    )


GEMMA2_NAMES = Names(LLAMA_LINEARS, _FOUR_NORMS)


def _scaled(f: Fields, **more: Any) -> dict[str, Any]:
    """Return the static settings of Gemma 2 and 3, which say their attention's scale."""
    scale = f.number("query_pre_attn_scalar", 256) ** -0.5
    return _gemma_static(f, attention_scale=scale, **more)


def _gemma2(f: Fields) -> decoder_config.Config:
    blocks = f.count("num_hidden_layers")
    rule = ["full_attention" if i % 2 else "sliding_attention" for i in range(blocks)]
    return read_config(
        f,
        GEMMA2_NAMES,
        windows=windows_by_type(
            read_layer_types(f, rule), f.count("sliding_window", DEFAULT_WINDOW)
        ),
        kv_heads=4,
        act_field="hidden_activation",
        static=_scaled(
            f,
            attention_cap=f.optional_number("attn_logit_softcapping", 50.0),
            logits_cap=f.optional_number("final_logit_softcapping", 30.0),
        ),
        rope_defaults=RopeDefaults(longest=8192),
        branch_norms=True,
        **_gemma_fields(f),
    )


GEMMA3_NAMES = Names(LLAMA_LINEARS, _FOUR_NORMS | QK_NORMS)


def _gemma3(f: Fields) -> decoder_config.Config:
    # The text sections of models that see images leave out what equals the defaults.
    f = Fields({"num_attention_heads": 8, "vocab_size": 262208, **f.config})
    blocks = f.count("num_hidden_layers")
    pattern = f.count("sliding_window_pattern", 6)
    rule = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(blocks)]
    h = f.count("head_dim", 256)
    both = f.section("rope_parameters")
    if not {"full_attention", "sliding_attention"} & set(both):
        # transformers 4: one section scales the blocks with full attention alone.
        both = {"full_attention": both or f.section("rope_scaling")}
    full, local = (Fields(both).section(f"{k}_attention") for k in ("full", "sliding"))
    # The windowed blocks have a base of their own, and no scaling unless they say so.
    local_theta = f.number("rope_local_base_freq", 10000.0)
    return read_config(
        f,
        GEMMA3_NAMES,
        windows=windows_by_type(
            read_layer_types(f, rule), f.count("sliding_window", DEFAULT_WINDOW)
        ),
        kv_heads=4,
        act_field="hidden_activation",
        # transformers reads attn_logit_softcapping here too, and does not use it.
        static=_scaled(f, logits_cap=f.optional_number("final_logit_softcapping")),
        branch_norms=True,
        qk_norm="head",
        rope=rope_of(f, full, h, RopeDefaults(1e6, longest=131072)),
        local_rope=rope_of(
            f, {"rope_theta": local_theta, **local}, h, RopeDefaults(longest=131072)
        ),
        **_gemma_fields(f),
    )


# model_type -> family.
GEMMAS = {
    "gemma": make_family("Gemma", GEMMA_NAMES, _gemma, bias_flags=ATTENTION_FLAG),
    "gemma2": make_family(
        "Gemma2",
        GEMMA2_NAMES,
        _gemma2,
        lists=layer_types,
        bias_flags=ATTENTION_FLAG,
        can_hold=heads_divide,
    ),
    "gemma3_text": make_family(
        "Gemma3",
        GEMMA3_NAMES,
        _gemma3,
        config_class="Gemma3TextConfig",
        lists=layer_types,
        bias_flags=ATTENTION_FLAG,
        can_hold=heads_divide,
    ),
}
