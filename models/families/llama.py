"""LLaMA's configuration and those near it: Mistral, Qwen2, Qwen3, Granite, SmolLM3, OLMo2."""

import dataclasses
from typing import Any

from models import decoder_config
from models.errors import InputError
from models.families.decoders import (
    ATTENTION_FLAG,
    BOTH_FLAGS,
    LLAMA_LINEARS,
    PRE_NORMS,
    QK_NORMS,
    attention_biases,
    flagged_biases,
    heads_divide,
    layer_types,
    make_family,
    read_config,
)
from models.families.fields import REPAIR, Fields
from models.families.positions import (
    DEFAULT_WINDOW,
    RopeDefaults,
    one_window,
    qwen_windows,
    read_layer_types,
    windows_by_type,
)
from models.families.specs import Names
from models.untrusted import is_count

LLAMA_NAMES = Names(LLAMA_LINEARS, PRE_NORMS)


def _llama(f: Fields) -> decoder_config.Config:
    return read_config(f, LLAMA_NAMES, biases=flagged_biases(f))


def _mistral(f: Fields) -> decoder_config.Config:
    return read_config(
        f,
        LLAMA_NAMES,
        windows=one_window(f, DEFAULT_WINDOW),
        rope_defaults=RopeDefaults(longest=131072),
    )


def _qwen2(f: Fields) -> decoder_config.Config:
    # Its configuration has no field for the biases, which are always there.
    return read_config(
        f,
        LLAMA_NAMES,
        biases=("q", "k", "v"),
        windows=qwen_windows(f),
        rope_defaults=RopeDefaults(longest=32768),
    )


QWEN3_NAMES = Names(LLAMA_LINEARS, PRE_NORMS | QK_NORMS)


def _qwen3(f: Fields) -> decoder_config.Config:
    return read_config(
        f,
        QWEN3_NAMES,
        biases=attention_biases(f),
        windows=qwen_windows(f),
        head_dim=128,
        kv_heads=32,
        rope_defaults=RopeDefaults(longest=32768),
        qk_norm="head",
    )


def _granite(f: Fields) -> decoder_config.Config:
    static: dict[str, Any] = {
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "attention_scale": f.number("attention_multiplier", 1.0),
        "branch_scale": f.number("residual_multiplier", 1.0),
        "logits_divisor": f.number("logits_scaling", 1.0),
    }
    c = read_config(f, LLAMA_NAMES, biases=flagged_biases(f), static=static)
    usual = c.head_dim**-0.5
    # Files round h ** -0.5 to a few digits. At that value the model computes what a LLaMA does.
    if abs(static["attention_scale"] - usual) <= 1e-6 * usual:
        return dataclasses.replace(c, static=c.static._replace(attention_scale=None))
    return c


def granite_identity(head_dim: int) -> dict[str, float]:
    """Return the multipliers with which a granite model computes what a LLaMA model does.

    Args:
      head_dim: Size of a head.
    """
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return dict.fromkeys(ones, 1.0) | {"attention_multiplier": head_dim**-0.5}


def _smollm3(f: Fields) -> decoder_config.Config:
    blocks = f.count("num_hidden_layers")
    interval = f.count("no_rope_layer_interval", 4)
    rotary = f.config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(blocks)]
    if (
        not isinstance(rotary, list)
        or len(rotary) != blocks
        or not all(is_count(r, 0, 1) for r in rotary)
    ):
        raise InputError(
            f"config.json: no_rope_layers must be a list of {blocks} zeros and ones", REPAIR
        )
    windows: tuple[int | None, ...] = (None,) * blocks
    if f.flag("use_sliding_window", False) and f.config.get("sliding_window") is not None:
        rule = ["full_attention" if r else "sliding_attention" for r in rotary]
        windows = windows_by_type(read_layer_types(f, rule), f.count("sliding_window"))
    return read_config(
        f,
        LLAMA_NAMES,
        biases=flagged_biases(f),
        windows=windows,
        tied=True,
        kv_heads=4,
        rope_defaults=RopeDefaults(theta=2e6, longest=32768),
        rotary=() if all(rotary) else tuple(bool(r) for r in rotary),
    )


OLMO2_NAMES = Names(
    LLAMA_LINEARS,
    {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    | QK_NORMS,
)


def _olmo2(f: Fields) -> decoder_config.Config:
    return read_config(
        f,
        OLMO2_NAMES,
        biases=attention_biases(f),
        eps=1e-5,
        static={"norm": "rms_float32"},
        branch_norms=True,
        qk_norm="whole",
    )


def _smollm3_lists(c: decoder_config.Config) -> dict[str, list[Any]]:
    rotary = c.rotary or (True,) * len(c.windows)
    return {"no_rope_layers": [int(r) for r in rotary]} | layer_types(c)


# model_type -> family.
LLAMAS = {
    "llama": make_family(
        "Llama", LLAMA_NAMES, _llama, bias_flags=BOTH_FLAGS, can_hold=heads_divide
    ),
    "mistral": make_family("Mistral", LLAMA_NAMES, _mistral),
    "qwen2": make_family("Qwen2", LLAMA_NAMES, _qwen2, lists=layer_types),
    "qwen3": make_family(
        "Qwen3", QWEN3_NAMES, _qwen3, lists=layer_types, bias_flags=ATTENTION_FLAG
    ),
    "granite": make_family("Granite", LLAMA_NAMES, _granite, bias_flags=BOTH_FLAGS),
    "smollm3": make_family(
        "SmolLM3", LLAMA_NAMES, _smollm3, lists=_smollm3_lists, bias_flags=BOTH_FLAGS
    ),
    "olmo2": make_family("Olmo2", OLMO2_NAMES, _olmo2, bias_flags=ATTENTION_FLAG),
}
