"""Reading that the decoder families share: `config.json` -> the switches of `models.decoder`.

Defaults are those of transformers, which leaves fields that equal them out of the file.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from models import decoder, decoder_config
from models.arch import Arch
from models.errors import InputError
from models.families.fields import REPAIR, Fields, read_biases, read_widths
from models.families.positions import RopeDefaults, read_rope
from models.families.specs import Family, Names, decoder_block, decoder_non_block

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")
ATTENTION_FLAG = {"attention_bias": ATTENTION}
BOTH_FLAGS = {**ATTENTION_FLAG, "mlp_bias": FEED_FORWARD}
LLAMA_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


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


def read_config(
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
    rope_defaults: RopeDefaults = RopeDefaults(),  # noqa: B008, a constant
    static: Mapping[str, Any] | None = None,
    **more: Any,
) -> decoder_config.Config:
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
      rope_defaults: Rotary settings that the file may leave out.
      static: Further fields of `decoder_config.StaticConfig`.
      **more: Further fields of `decoder_config.Config`.

    Returns:
      Configuration.

    Raises:
      InputError: A field is wrong.
    """
    sizes = _heads(f, head_dim, kv_heads)
    h = sizes.pop("head_dim")
    fixed = decoder_config.StaticConfig(
        h, f.number(eps_field, eps), f.act(act_field, act), **(static or {})
    )
    if "rope" not in more:
        more["rope"] = read_rope(f, h, rope_defaults)
    return decoder_config.Config(
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


def flagged_biases(f: Fields) -> tuple[str, ...]:
    """Return the slots that `attention_bias` and `mlp_bias` give a bias."""
    attention = ATTENTION if f.flag("attention_bias", False) else ()
    return attention + (FEED_FORWARD if f.flag("mlp_bias", False) else ())


def attention_biases(f: Fields) -> tuple[str, ...]:
    """Return the slots that `attention_bias` alone gives a bias."""
    return ATTENTION if f.flag("attention_bias", False) else ()


def layer_types(c: decoder_config.Config) -> dict[str, list[Any]]:
    """Return the kind of attention of each block where one has a window."""
    if not any(c.windows):
        return {}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
    return {"layer_types": kinds}


def heads_divide(c: decoder_config.Config) -> bool:
    """Return True if the query heads divide the hidden size, as some stock types demand.

    Args:
      c: Configuration.
    """
    # transformers refuses other counts, head_dim given or not.
    return c.dim % c.query_heads == 0


def make_family(
    classes: str, names: Names, read: Callable[[Fields], decoder_config.Config], **more: Any
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
