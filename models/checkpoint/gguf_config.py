"""The `config.json` of a GGUF file, from its settings and the names of its tensors."""

import math
from collections.abc import Iterable
from typing import Any

from models.checkpoint.gguf_blocks import BlockCounts, bias_fields, ragged_fields
from models.checkpoint.gguf_fields import REMEDY, Settings
from models.checkpoint.gguf_names import TOKENS, Architecture
from models.checkpoint.gguf_rope import read_rope
from models.errors import InputError
from models.families import hf
from models.untrusted import is_count


def read_config(
    settings: Settings, arch: Architecture, counts: BlockCounts | None, names: Iterable[str]
) -> dict[str, Any]:
    """Read the `config.json` of a file.

    Args:
      settings: Settings of the file.
      arch: Its architecture.
      counts: Sizes of each block where they may differ, else None.
      names: Hugging Face names of its tensors.

    Returns:
      Contents of the `config.json`.

    Raises:
      InputError: A setting is wrong, or the model has no such configuration.
    """
    file = settings.file
    width = settings.count("embedding_length")
    config: dict[str, Any] = {
        "architectures": [hf.FAMILIES[arch.model_type].model_class],
        "model_type": arch.model_type,
        arch.act_field: arch.act,
        "hidden_size": width,
    }
    if counts is None:
        heads = settings.count("attention.head_count")
        config["intermediate_size"] = settings.count("feed_forward_length")
        config["num_attention_heads"] = heads
        config["num_key_value_heads"] = settings.count("attention.head_count_kv", heads)
    else:
        config |= ragged_fields(counts, names)
        heads = config["num_attention_heads"]
    # Absent lengths follow from the hidden size, as in llama.cpp.
    head_dim, rotated = _head_dim(settings, arch, width // heads)
    context = settings.count("context_length")
    field, key = arch.eps
    config |= {
        "num_hidden_layers": settings.count("block_count"),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        field: settings.number(key),
        **_positions(settings, arch, head_dim, rotated, context),
        # A head that equals the embedding is left out of the file.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "dtype": "float32",
    }
    if counts is None:
        config |= bias_fields(config, names)
    config |= _scales(settings, arch, config)
    for name, key in TOKENS.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        # As in llama.cpp, an id that is none counts as absent.
        if is_count(token, 0):
            config[f"{name}_token_id"] = token
    return config


def _head_dim(settings: Settings, arch: Architecture, default: int) -> tuple[int, int]:
    """Return the size of a head, which keys and values must share, and its rotated channels."""
    size = settings.count("attention.key_length", default)
    rotated = settings.count("rope.dimension_count", size)
    if not arch.partial:
        # Files of before key_length have the size of a head here.
        size = settings.count("attention.key_length", rotated)
    values = settings.count("attention.value_length", size)
    if size != values or (rotated != size and not arch.partial) or rotated > size:
        raise InputError(
            f"{settings.file.path}: keys, values and rotary dimensions differ in width, unlike "
            f"those of {settings.kind}",
            REMEDY,
        )
    return size, rotated


def _positions(
    settings: Settings, arch: Architecture, head_dim: int, rotated: int, context: int
) -> dict[str, Any]:
    """Return what `config.json` says of rotary positions and windows."""
    rope = read_rope(settings, rotated, context)
    fields: dict[str, Any] = {}
    if arch.partial:
        share = rotated / head_dim
        # Configurations cut the product down to an integer.
        below = int(head_dim * share) < rotated
        rope["partial_rotary_factor"] = math.nextafter(share, 1) if below else share
    if rope["rope_type"] == "longrope":
        # Phi-3's configuration has the length here and not in the section.
        name = "original_max_position_embeddings"
        fields[name] = rope[name]
    if arch.local_rope:
        base = settings.number("rope.freq_base_swa", 10000.0)
        local = {"rope_theta": base, "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
    blocks = settings.count("block_count")
    if arch.unrotated:
        fields["no_rope_layers"] = [int((i + 1) % arch.unrotated != 0) for i in range(blocks)]
    return {"rope_parameters": rope, **fields, **_windows(settings, arch, blocks)}


def _windows(settings: Settings, arch: Architecture, blocks: int) -> dict[str, Any]:
    """Return the fields of sliding windows."""
    if arch.sliding is None:
        return {}
    given = settings.get("attention.sliding_window")
    # As in llama.cpp, 0 is no window.
    window = settings.count("attention.sliding_window", least=0) if given is not None else None
    window = arch.sliding.window if window is None else window
    if window and not arch.sliding.held:
        raise InputError(
            f"{settings.file.path}: sliding windows are not read from GGUF for {settings.kind}",
            REMEDY,
        )
    pattern = settings.get("attention.sliding_window_pattern")
    pattern = arch.sliding.period if pattern is None else pattern
    if is_count(pattern, 0):
        pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(blocks)]
    is_list = isinstance(pattern, list) and len(pattern) == blocks
    if not is_list or any(not isinstance(is_local, bool) for is_local in pattern):
        raise InputError(
            f"{settings.file.path}: the pattern of sliding windows is not one of {blocks} blocks",
            "download it again",
        )
    if not arch.sliding.period:
        return {"sliding_window": window or None}
    kinds = ["sliding_attention" if w and window else "full_attention" for w in pattern]
    return {"sliding_window": window or None, "layer_types": kinds}


def _scales(settings: Settings, arch: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of scales and caps."""
    fields: dict[str, Any] = {}
    for field, (key, default) in arch.numbers.items():
        # llama.cpp takes the usual scale of attention where the file has none.
        usual = config["head_dim"] ** -0.5 if key == "attention.scale" else default
        fields[field] = settings.optional_number(key) or usual
    if arch.wide_blocks is not None:
        wide = config["num_hidden_layers"] == arch.wide_blocks
        by_width = config["hidden_size"] // config["num_attention_heads"]
        fields["query_pre_attn_scalar"] = by_width if wide else config["head_dim"]
    return fields
