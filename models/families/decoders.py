"""Configurations of the decoder families: `config.json` -> the switches of `models.decoder`.

Defaults are those of transformers, which leaves fields that equal them out of the file.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from models import decoder
from models.arch import Arch
from models.decoder import NormKind
from models.errors import InputError
from models.families.fields import REPAIR, Fields, read_biases, read_widths
from models.families.positions import (
    DEFAULT_WINDOW,
    one_window,
    qwen_windows,
    read_layer_types,
    read_rope,
    rope_of,
    windows_by_type,
)
from models.families.specs import Family, Names, decoder_block, decoder_non_block

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")
_LLAMA_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
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
_PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
LLAMA_NAMES = Names(_LLAMA_LINEARS, _PRE_NORMS)


def _heads(f: Fields, head_dim: int | None, kv_heads: int | None) -> dict[str, Any]:
    """Read the sizes of attention, with the family's defaults; None derives them."""
    dim, n = f.count("hidden_size"), f.count("num_attention_heads")
    # Null stands for as many as query heads, an absent field for the family's default.
    default = n if "num_key_value_heads" in f.config or kv_heads is None else kv_heads
    kv = f.count("num_key_value_heads", default)
    if n % kv:
        raise InputError(
            f"config.json: num_attention_heads={n} is not a multiple of num_key_value_heads={kv}",
            REPAIR,
        )
    # With head_dim given, heads need not make up the hidden size: pruned models rely on it.
    if head_dim is None and f.config.get("head_dim") is None and dim % n:
        raise InputError(
            f"config.json: hidden_size={dim} is not a multiple of num_attention_heads={n}, and "
            "head_dim is not given",
            REPAIR,
        )
    h = f.count("head_dim", dim // n if head_dim is None else head_dim)
    if h % 2:
        raise InputError(f"config.json: head_dim={h} must be even, for rotary positions", REPAIR)
    return {"dim": dim, "query_heads": n, "kv_heads": kv, "head_dim": h}


def _config(
    f: Fields,
    names: Names,
    *,
    biases: tuple[str, ...] = (),
    windows: tuple[int | None, ...] | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    eps_field: str = "rms_norm_eps",
    act: str = "silu",
    act_field: str = "hidden_act",
    head_dim: int | None = None,
    kv_heads: int | None = None,
    rope_options: Mapping[str, Any] | None = None,
    static: Mapping[str, Any] | None = None,
    **more: Any,
) -> decoder.Config:
    """Read what the families share, with one family's defaults.

    Args:
      f: Reader of the configuration.
      names: Names of the family.
      biases: Slots that have a bias in the stock model.
      windows: Window of each block; None for full attention everywhere.
      tied: Default of `tie_word_embeddings`.
      eps: Default of the norms' constant.
      eps_field: Its field.
      act: Default activation.
      act_field: Its field.
      head_dim: Default size of a head; None for the hidden size over the heads.
      kv_heads: Default number of key-value heads; None for as many as query heads.
      rope_options: Further arguments of `read_rope`.
      static: Further fields of `decoder.StaticConfig`.
      **more: Further fields of `decoder.Config`.

    Returns:
      Configuration.

    Raises:
      InputError: A field is wrong.
    """
    sizes = _heads(f, head_dim, kv_heads)
    h = sizes.pop("head_dim")
    fixed = decoder.StaticConfig(
        h, f.number(eps_field, eps), f.act(act_field, act), **(static or {})
    )
    if "rope" not in more:
        more["rope"] = read_rope(f, h, **(rope_options or {}))
    return decoder.Config(
        static=fixed,
        windows=(None,) * f.count("num_hidden_layers") if windows is None else windows,
        ffn_dim=f.count("intermediate_size"),
        vocab=f.count("vocab_size"),
        tied=f.flag("tie_word_embeddings", tied),
        biases=read_biases(f, names.linears, biases),
        widths=read_widths(f),
        **sizes,
        **more,
    )


def _flagged_biases(f: Fields) -> tuple[str, ...]:
    """Return the slots that `attention_bias` and `mlp_bias` give a bias."""
    attention = ATTENTION if f.flag("attention_bias", False) else ()
    return attention + (FEED_FORWARD if f.flag("mlp_bias", False) else ())


def _attention_biases(f: Fields) -> tuple[str, ...]:
    """Return the slots that `attention_bias` alone gives a bias."""
    return ATTENTION if f.flag("attention_bias", False) else ()


def _llama(f: Fields) -> decoder.Config:
    return _config(f, LLAMA_NAMES, biases=_flagged_biases(f))


def _mistral(f: Fields) -> decoder.Config:
    return _config(f, LLAMA_NAMES, windows=one_window(f, DEFAULT_WINDOW))


def _qwen2(f: Fields) -> decoder.Config:
    # Its configuration has no field for the biases, which are always there.
    return _config(f, LLAMA_NAMES, biases=("q", "k", "v"), windows=qwen_windows(f))


QWEN3_NAMES = Names(_LLAMA_LINEARS, _PRE_NORMS | _QK_NORMS)


def _qwen3(f: Fields) -> decoder.Config:
    return _config(
        f,
        QWEN3_NAMES,
        biases=_attention_biases(f),
        windows=qwen_windows(f),
        head_dim=128,
        kv_heads=32,
        qk_norm="head",
    )


def _granite(f: Fields) -> decoder.Config:
    static: dict[str, Any] = {
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "attention_scale": f.number("attention_multiplier", 1.0),
        "branch_scale": f.number("residual_multiplier", 1.0),
        "logits_divisor": f.number("logits_scaling", 1.0),
    }
    c = _config(f, LLAMA_NAMES, biases=_flagged_biases(f), static=static)
    usual = c.head_dim**-0.5
    # Files round h ** -0.5 to a few digits. At that value the model computes what a LLaMA does.
    if abs(static["attention_scale"] - usual) <= 1e-6 * usual:
        static["attention_scale"] = None
        c = _config(f, LLAMA_NAMES, biases=_flagged_biases(f), static=static)
    return c


def granite_identity(head_dim: int) -> dict[str, float]:
    """Return the multipliers with which a granite model computes what a LLaMA model does.

    Args:
      head_dim: Size of a head.
    """
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return dict.fromkeys(ones, 1.0) | {"attention_multiplier": head_dim**-0.5}


def _smollm3(f: Fields) -> decoder.Config:
    blocks = f.count("num_hidden_layers")
    interval = f.count("no_rope_layer_interval", 4)
    rotary = f.config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(blocks)]
    if not isinstance(rotary, list) or len(rotary) != blocks or set(map(str, rotary)) - set("01"):
        raise InputError(
            f"config.json: no_rope_layers must be a list of {blocks} zeros and ones", REPAIR
        )
    windows: tuple[int | None, ...] = (None,) * blocks
    if f.flag("use_sliding_window", False) and f.config.get("sliding_window") is not None:
        rule = ["full_attention" if r else "sliding_attention" for r in rotary]
        windows = windows_by_type(read_layer_types(f, rule), f.count("sliding_window"))
    return _config(
        f,
        LLAMA_NAMES,
        biases=_flagged_biases(f),
        windows=windows,
        tied=True,
        kv_heads=4,
        rope_options={"theta": 2e6},
        rotary=() if all(rotary) else tuple(bool(r) for r in rotary),
    )


OLMO2_NAMES = Names(
    _LLAMA_LINEARS,
    {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    | _QK_NORMS,
)


def _olmo2(f: Fields) -> decoder.Config:
    return _config(
        f,
        OLMO2_NAMES,
        biases=_attention_biases(f),
        eps=1e-5,
        static={"norm": "rms_float32"},
        branch_norms=True,
        qk_norm="whole",
    )


PHI_NAMES = Names(
    _PHI_LINEARS,
    {
        "attn_norm": "input_layernorm",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
    },
    final_norm="model.final_layernorm",
)


def _phi(f: Fields) -> decoder.Config:
    return _config(
        f,
        PHI_NAMES,
        biases=tuple(_PHI_LINEARS),
        eps=1e-5,
        eps_field="layer_norm_eps",
        act="gelu_new",
        rope_options={"share": 0.5},
        static={"norm": "layer", "parallel": True},
        gated=False,
        qk_norm="head" if f.flag("qk_layernorm", False) else "",
        head_bias=True,
    )


PHI3_NAMES = Names(_PHI3_LINEARS, _PRE_NORMS)


def _phi3(f: Fields) -> decoder.Config:
    # Files of before transformers 4.43 call longrope by these names.
    old = {"su": "longrope", "yarn": "longrope"}
    rope = {"share": 1.0, "old_names": old, "original": 4096}
    return _config(f, PHI3_NAMES, windows=one_window(f, None), eps=1e-5, rope_options=rope)


def _gemma_fields(f: Fields) -> dict[str, Any]:
    """Return what all Gemma families share; InputError for a model that is no decoder."""
    if f.flag("use_bidirectional_attention", False):
        raise InputError(
            "config.json: use_bidirectional_attention=true is not supported",
            "such a model embeds texts and predicts no tokens",
        )
    return {
        "biases": _attention_biases(f),
        "tied": True,
        "act": "gelu_pytorch_tanh",
        "head_dim": 256,
    }


def _gemma_static(f: Fields, **more: Any) -> dict[str, Any]:
    norm: NormKind = "rms_offset"
    scale = float(f.count("hidden_size")) ** 0.5
    return {"norm": norm, "embed_scale": scale, "embed_scale_rounded": True, **more}


def _gemma(f: Fields) -> decoder.Config:
    # The first files say "gelu" and mean its tanh form, as transformers reads them.
    if f.config.get("hidden_act") == "gelu":
        f = Fields({**f.config, "hidden_act": "gelu_pytorch_tanh"})
    return _config(f, LLAMA_NAMES, kv_heads=16, static=_gemma_static(f), **_gemma_fields(f))


GEMMA2_NAMES = Names(_LLAMA_LINEARS, _FOUR_NORMS)


def _scaled(f: Fields, **more: Any) -> dict[str, Any]:
    """Return the static settings of Gemma 2 and 3, which say their attention's scale."""
    scale = f.number("query_pre_attn_scalar", 256) ** -0.5
    return _gemma_static(f, attention_scale=scale, **more)


def _gemma2(f: Fields) -> decoder.Config:
    blocks = f.count("num_hidden_layers")
    rule = ["full_attention" if i % 2 else "sliding_attention" for i in range(blocks)]
    return _config(
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
        branch_norms=True,
        **_gemma_fields(f),
    )


GEMMA3_NAMES = Names(_LLAMA_LINEARS, _FOUR_NORMS | _QK_NORMS)


def _gemma3(f: Fields) -> decoder.Config:
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
    return _config(
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
        rope=rope_of(f, full, h, 1e6),
        local_rope=rope_of(f, {"rope_theta": local_theta, **local}, h, 10000.0),
        **_gemma_fields(f),
    )


def _layer_types(c: decoder.Config) -> dict[str, list[Any]]:
    """Return the kind of attention of each block where one has a window."""
    if not any(c.windows):
        return {}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
    return {"layer_types": kinds}


def _smollm3_lists(c: decoder.Config) -> dict[str, list[Any]]:
    rotary = c.rotary or (True,) * len(c.windows)
    return {"no_rope_layers": [int(r) for r in rotary]} | _layer_types(c)


def _heads_divide(c: decoder.Config) -> bool:
    # transformers refuses other counts, head_dim given or not.
    return c.dim % c.query_heads == 0


def _heads_have_stock_size(c: decoder.Config) -> bool:
    # Phi's norms of queries and keys, and Phi-3's check of longrope's factors, ignore head_dim.
    ignores = bool(c.qk_norm) or c.rope.kind == "longrope"
    return not ignores or c.dim // c.query_heads == c.head_dim


def _family(
    classes: str, names: Names, read: Callable[[Fields], decoder.Config], **more: Any
) -> Family:
    """Make a family of `models.decoder`; `more` are further fields of Family."""

    def arch(config: Mapping[str, Any]) -> Arch:
        return decoder.arch(read(Fields(config)))

    fields = {
        "config_class": f"{classes}Config",
        "model_class": f"{classes}ForCausalLM",
        "linears": names.linears,
        "arch": arch,
        "non_block": functools.partial(decoder_non_block, names),
        "block": functools.partial(decoder_block, names),
        **more,
    }
    return Family(**fields)


_ATTENTION_FLAG = {"attention_bias": ATTENTION}
_BOTH_FLAGS = {**_ATTENTION_FLAG, "mlp_bias": FEED_FORWARD}
# model_type -> family.
DECODERS = {
    "llama": _family("Llama", LLAMA_NAMES, _llama, bias_flags=_BOTH_FLAGS, can_hold=_heads_divide),
    "mistral": _family("Mistral", LLAMA_NAMES, _mistral),
    "qwen2": _family("Qwen2", LLAMA_NAMES, _qwen2, lists=_layer_types),
    "qwen3": _family("Qwen3", QWEN3_NAMES, _qwen3, lists=_layer_types, bias_flags=_ATTENTION_FLAG),
    "granite": _family("Granite", LLAMA_NAMES, _granite, bias_flags=_BOTH_FLAGS),
    "smollm3": _family(
        "SmolLM3", LLAMA_NAMES, _smollm3, lists=_smollm3_lists, bias_flags=_BOTH_FLAGS
    ),
    "olmo2": _family("Olmo2", OLMO2_NAMES, _olmo2, bias_flags=_ATTENTION_FLAG),
    "phi": _family("Phi", PHI_NAMES, _phi, can_hold=_heads_have_stock_size),
    "phi3": _family("Phi3", PHI3_NAMES, _phi3, can_hold=_heads_have_stock_size),
    "gemma": _family("Gemma", LLAMA_NAMES, _gemma, bias_flags=_ATTENTION_FLAG),
    "gemma2": _family(
        "Gemma2",
        GEMMA2_NAMES,
        _gemma2,
        lists=_layer_types,
        bias_flags=_ATTENTION_FLAG,
        can_hold=_heads_divide,
    ),
    "gemma3_text": _family(
        "Gemma3",
        GEMMA3_NAMES,
        _gemma3,
        config_class="Gemma3TextConfig",
        lists=_layer_types,
        bias_flags=_ATTENTION_FLAG,
        can_hold=_heads_divide,
    ),
}
