"""Spelling of `config.json` for transformers 4 and 5, which name some fields differently."""

from collections.abc import Mapping
from typing import Any

from models import decoder_config
from models.families import hf


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Add the stored type to a configuration, and its rotary base in both spellings.

    transformers 4 reads `torch_dtype` and `rope_theta`, transformers 5 `dtype` and
    `rope_parameters`. Both are written where they apply.

    Args:
      config: Contents of `config.json`.
      dtype: Name of the stored type, such as "bfloat16".

    Returns:
      New configuration.
    """
    new = {**config, "torch_dtype": dtype, "dtype": dtype}
    rope, read = config.get("rope_parameters"), hf.family(config).arch(config).config
    # OPT's positions are learned; a section that its file has anyway says nothing.
    if rope and isinstance(read, decoder_config.Config):
        # Gemma 3 has a section for each kind of attention; one field of before holds each base.
        if read.local_rope is not None:
            new["rope_local_base_freq"] = read.local_rope.theta
            rope = rope.get("full_attention", rope) or {}
        new["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", read.rope.theta))
        if read.rope.kind != "default":
            new["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return new
