"""Checked reading of what `config.json` says of positions: rotary settings and windows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from models.errors import InputError
from models.families.fields import REPAIR, Fields
from models.rotary import Rope
from models.untrusted import is_count, shown

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")
# Sliding window of the families that have one where the file leaves it out.
DEFAULT_WINDOW = 4096


class RopeDefaults(NamedTuple):
    """Rotary settings of a family where its file leaves them out.

    Attributes:
      theta: Base.
      share: Share of a head that is rotated; None for families that rotate all of it.
      old_names: Other names of kinds of scaling.
      original: `original_max_position_embeddings`; None for `max_position_embeddings`.
      longest: `max_position_embeddings`.
    """

    theta: float = 10000.0
    share: float | None = None
    old_names: Mapping[str, str] = {}
    original: int | None = None
    longest: int = 2048


def read_rope(f: Fields, head_dim: int, defaults: RopeDefaults) -> Rope:
    """Read the rotary settings.

    Both spellings are known: `rope_theta` with `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5).

    Args:
      f: Reader of the configuration.
      head_dim: Size of a head.
      defaults: Settings that the file may leave out.

    Returns:
      Rotary settings.

    Raises:
      InputError: The kind of scaling is not supported, a field is wrong, or both spellings are
        there and say different things.
    """
    spellings = [f.section(name) for name in ("rope_parameters", "rope_scaling")]
    given = [rope_of(f, section, head_dim, defaults) for section in spellings if section]
    if len(set(given)) > 1:
        raise InputError(
            "config.json: rope_parameters and rope_scaling disagree",
            "leave out the one that is wrong: versions of transformers read one or the other",
        )
    return given[0] if given else rope_of(f, {}, head_dim, defaults)


def rope_of(
    f: Fields, parameters: Mapping[str, Any], head_dim: int, defaults: RopeDefaults
) -> Rope:
    """Read the rotary settings of one section of the configuration.

    Args:
      f: Reader of the configuration.
      parameters: The section, which goes before fields of the configuration itself.
      head_dim: Size of a head.
      defaults: Settings that the file may leave out.

    Returns:
      Rotary settings.

    Raises:
      InputError: The kind of scaling is not supported or a field is wrong.
    """
    g = Fields(parameters)
    # Older files call it `type`. transformers takes an absent kind as the default, but no null.
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = defaults.old_names.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_KINDS:
        raise InputError(
            f"config.json: rope type {shown(kind)} is not supported",
            f"it must be one of {', '.join(ROPE_KINDS)}",
        )
    # Without scaling nothing follows from the length, so that all families may share one default.
    longest = f.count("max_position_embeddings", 2048 if kind == "default" else defaults.longest)
    rope = Rope(
        theta=g.number("rope_theta", f.number("rope_theta", defaults.theta)),
        kind=kind,
        # These two derive it from the lengths where it is null, below.
        factor=1.0 if kind in ("yarn", "longrope") else g.number("factor", 1.0),
        max_positions=longest,
        share=_share(f, g, head_dim, defaults.share),
    )
    if kind == "dynamic" and rope.rotated(head_dim) < 4:
        raise InputError("config.json: dynamic scaling needs four rotated channels of a head")
    if kind in ("default", "linear", "dynamic"):
        return rope
    # These scale from another length than the model's longest text.
    before = f.config.get("original_max_position_embeddings", defaults.original)
    before = g.count("original_max_position_embeddings", longest) if before is None else before
    if not is_count(before):
        raise InputError(
            f"config.json: original_max_position_embeddings must be an integer, not "
            f"{shown(before)}",
            REPAIR,
        )
    if kind in ("yarn", "longrope"):
        rope = dataclasses.replace(rope, factor=g.optional_number("factor") or longest / before)
    rope = dataclasses.replace(rope, max_positions=before)
    return {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[kind](g, rope, head_dim)


def _share(f: Fields, g: Fields, head_dim: int, default: float | None) -> float:
    """Read the share of a head's channels that are rotated; None rotates all of them."""
    share = g.number("partial_rotary_factor", f.number("partial_rotary_factor", default or 1.0))
    if (default is None and share != 1.0) or share > 1 or int(head_dim * share) < 2:
        raise InputError(f"config.json: partial_rotary_factor={share:g} is not supported")
    if int(head_dim * share) % 2:
        raise InputError(
            f"config.json: {int(head_dim * share)} rotated channels of a head must be an even "
            "number",
            REPAIR,
        )
    return share


def _llama3(g: Fields, rope: Rope, head_dim: int) -> Rope:
    low, high = g.number("low_freq_factor", 1.0), g.number("high_freq_factor", 4.0)
    if low >= high:
        raise InputError(
            f"config.json: low_freq_factor={low} must be less than high_freq_factor={high}", REPAIR
        )
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(g: Fields, rope: Rope, head_dim: int) -> Rope:
    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.theta == 1.0:
        raise InputError("config.json: yarn needs a rope_theta other than 1", REPAIR)
    over, under = g.optional_number("mscale"), g.optional_number("mscale_all_dim")
    # Source: Peng et al. 2023 (YaRN), section 3.4; the ratio is DeepSeek's.
    default = magnitude(over) / magnitude(under) if over and under else magnitude()
    return dataclasses.replace(
        rope,
        attention_factor=g.optional_number("attention_factor") or default,
        beta_fast=g.optional_number("beta_fast") or 32.0,
        beta_slow=g.optional_number("beta_slow") or 1.0,
        truncate=g.flag("truncate", True),
    )


def _longrope(g: Fields, rope: Rope, head_dim: int) -> Rope:
    # Source: Ding et al. 2024 (LongRoPE); the factor of the attention is Phi-3's.
    default = 1.0
    if rope.factor > 1:
        default = math.sqrt(1 + math.log(rope.factor) / math.log(max(2, rope.max_positions)))
    return dataclasses.replace(
        rope,
        attention_factor=g.optional_number("attention_factor") or default,
        short_factors=_factors(g, "short_factor", rope.rotated(head_dim) // 2),
        long_factors=_factors(g, "long_factor", rope.rotated(head_dim) // 2),
    )


def _factors(g: Fields, name: str, count: int) -> tuple[float, ...]:
    """Read a list of positive numbers, one for each frequency."""
    values = g.config.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise InputError(
            f"config.json: {name} must be a list of {count} numbers, not {shown(values)}", REPAIR
        )
    return tuple(Fields({name: value}).number(name, 1.0) for value in values)


def read_layer_types(f: Fields, default: Sequence[str]) -> tuple[str, ...]:
    """Read the kind of attention of each block.

    Args:
      f: Reader of the configuration.
      default: Kinds where the file has no list.

    Returns:
      "full_attention" or "sliding_attention" of each block.

    Raises:
      InputError: The list has another length or another word.
    """
    kinds = f.config.get("layer_types") or list(default)
    is_list = isinstance(kinds, list) and len(kinds) == len(default)
    if not is_list or any(k not in LAYER_TYPES for k in kinds):
        raise InputError(
            f"config.json: layer_types must be a list of {len(default)} words out of "
            f"{', '.join(LAYER_TYPES)}",
            REPAIR,
        )
    return tuple(kinds)


def windows_by_type(kinds: Sequence[str], window: int) -> tuple[int | None, ...]:
    """Return the window of each block, None for full attention.

    Args:
      kinds: Kind of attention of each block.
      window: Window of "sliding_attention" in positions.
    """
    return tuple(window if k == "sliding_attention" else None for k in kinds)


def one_window(f: Fields, default: int | None) -> tuple[int | None, ...]:
    """Read one window for all blocks.

    Args:
      f: Reader of the configuration.
      default: Window where the file leaves it out; None for full attention.

    Returns:
      Window of each block in positions, None for full attention.

    Raises:
      InputError: The field is no positive integer.
    """
    blocks = f.count("num_hidden_layers")
    if f.config.get("sliding_window", default) is None:
        return (None,) * blocks
    return (f.count("sliding_window", default),) * blocks


def qwen_windows(f: Fields) -> tuple[int | None, ...]:
    """Read the windows of Qwen2 and Qwen3, whose first blocks see everything.

    Args:
      f: Reader of the configuration.

    Returns:
      Window of each block in positions, None for full attention.

    Raises:
      InputError: A field is wrong.
    """
    blocks = f.count("num_hidden_layers")
    sliding = f.flag("use_sliding_window", False)
    if not sliding or f.config.get("sliding_window", DEFAULT_WINDOW) is None:
        return (None,) * blocks
    full = f.count("max_window_layers", 28, least=0)
    rule = ["full_attention" if i < full else "sliding_attention" for i in range(blocks)]
    return windows_by_type(read_layer_types(f, rule), f.count("sliding_window", DEFAULT_WINDOW))
