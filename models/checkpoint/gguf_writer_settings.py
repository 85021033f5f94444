"""Settings of a GGUF file for llama.cpp, and the check that they say all of a model.

llama.cpp fixes by architecture what its files have no setting for, such as the blocks with a
window. The reader knows these rules, so settings that it reads as the model's own are enough.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from models import decoder_config
from models.checkpoint.gguf_config import read_config
from models.checkpoint.gguf_fields import Settings
from models.checkpoint.gguf_file import GgufFile, Stored
from models.checkpoint.gguf_names import (
    ARCHITECTURES,
    LONG_FACTORS,
    NUMBERS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
)
from models.families import hf
from models.rotary import Rope, inverse_frequencies


class Sizes(NamedTuple):
    """Sizes of the blocks in a file: one number for all, or a list with one for each.

    Attributes:
      blocks: Number of blocks.
      heads: Query heads.
      kv_heads: Key-value heads.
      neurons: Neurons of the feed-forward part.
    """

    blocks: int
    heads: int | list[int]
    kv_heads: int | list[int]
    neurons: int | list[int]


def longest_text(c: decoder_config.Config, arch: Architecture, positions: int) -> int:
    """Return the length up to which llama.cpp computes the same function.

    Args:
      c: Configuration of the model.
      arch: Architecture of the file.
      positions: The model's own limit. Dynamic scaling begins there.

    Returns:
      Tokens.
    """
    if arch.sliding is not None and arch.sliding.period:
        return positions
    # llama.cpp has no windows here. Up to a window's length the function is the same.
    return min([positions, *(w for w in c.windows if w is not None)])


def settings_of(
    c: decoder_config.Config, arch: Architecture, sizes: Sizes, context: int
) -> dict[str, Any]:
    """Return the settings of a file, without the name of the architecture.

    Args:
      c: Configuration of the model.
      arch: Architecture of the file.
      sizes: Sizes of its blocks.
      context: The longest text in tokens.

    Returns:
      Integers, floats, strings and lists of integers.
    """
    found: dict[str, Any] = {
        "vocab_size": c.vocab,
        "context_length": context,
        "embedding_length": c.dim,
        "block_count": sizes.blocks,
        "feed_forward_length": sizes.neurons,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        arch.eps[1]: c.static.eps,
        "rope.dimension_count": c.rope.rotated(c.head_dim),
        "rope.freq_base": c.rope.theta,
    }
    numbers = {key: getattr(c.static, NUMBERS[key]) for key, _ in arch.numbers.values()}
    found |= {key: value for key, value in numbers.items() if value is not None}
    window = next((w for w in c.windows if w), 0)
    # Phi-3's files say 0, which others read as a window of nothing.
    if arch.sliding is not None and arch.sliding.held and (window or not arch.sliding.period):
        found["attention.sliding_window"] = window
    if c.local_rope is not None:
        found["rope.freq_base_swa"] = c.local_rope.theta
    return found | _scaling(c.rope)


def _scaling(rope: Rope) -> dict[str, Any]:
    """Return the settings of rotary scaling."""
    if rope.kind not in ("linear", "yarn", "longrope"):
        # llama.cpp has no dynamic scaling, which changes nothing up to the model's limit; of
        # LLaMA 3's, files hold the factors alone.
        return {}
    found: dict[str, Any] = {"rope.scaling.type": rope.kind}
    if rope.kind != "longrope":
        found["rope.scaling.factor"] = rope.factor
    if rope.kind == "linear":
        return found
    found["rope.scaling.original_context_length"] = rope.max_positions
    times = rope.attention_factor
    if rope.kind == "yarn":
        found["rope.scaling.yarn_beta_fast"] = rope.beta_fast
        found["rope.scaling.yarn_beta_slow"] = rope.beta_slow
        # llama.cpp multiplies yarn's usual factor.
        times /= 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    if not math.isclose(times, 1.0):
        found["rope.scaling.attn_factor"] = times
    return found


def factor_tensors(rope: Rope, head_dim: int) -> dict[str, np.ndarray]:
    """Return the tensors of rotary scaling, float32 [r/2].

    Args:
      rope: Rotary settings.
      head_dim: Size of a head.
    """
    if rope.kind == "longrope":
        named = {LONG_FACTORS: rope.long_factors, SHORT_FACTORS: rope.short_factors}
        return {name: np.array(values, np.float32) for name, values in named.items()}
    if rope.kind != "llama3":
        return {}
    plain = inverse_frequencies(dataclasses.replace(rope, kind="default"), head_dim, 1)
    return {ROPE_FACTORS: plain / inverse_frequencies(rope, head_dim, 1)}


def unsaid(c: decoder_config.Config, architecture: str, sizes: Sizes, context: int) -> list[str]:
    """Return what the settings of a file do not say of a model.

    Args:
      c: Configuration of the model.
      architecture: Architecture of the file, of blocks that are alike.
      sizes: Sizes of its blocks.
      context: The longest text in tokens.

    Returns:
      Fields of `decoder_config.Config`; empty if llama.cpp computes the model.
    """
    arch = ARCHITECTURES[architecture]
    said = settings_of(c, arch, sizes, context)
    # The reader takes factors of rotary scaling from the file, which is not there yet.
    said = {key: value for key, value in said.items() if not key.startswith("rope.scaling.")}
    matrix = Stored((c.vocab, c.dim), "F32", 0, 0)
    file = GgufFile(
        pathlib.Path(architecture),
        {f"{architecture}.{key}": value for key, value in said.items()},
        {"token_embd.weight": matrix} | ({} if c.tied else {"output.weight": matrix}),
    )
    config = read_config(Settings(file, architecture), arch, None, ())
    read = _comparable(hf.family(config).arch(config).config, context)
    # Any: blocks that are alike have one number each.
    heads, kv_heads, neurons = cast(Any, sizes[1:])
    wanted = dataclasses.replace(
        c, query_heads=heads, kv_heads=kv_heads, ffn_dim=neurons, widths=()
    )
    return _differences(_comparable(wanted, context), read)


def _comparable(c: decoder_config.Config, context: int) -> dict[str, Any]:
    """Return the fields of a configuration that are compared, rotary scaling left out."""
    # A window that no text exceeds is none.
    windows = [w if w is not None and w < context else None for w in c.windows]
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)} | c.static._asdict()
    for name in ("static", "rope", "local_rope", "biases"):
        del fields[name]
    fields["windows"] = windows
    fields["rope.theta"] = [r.theta for r in (c.rope, c.local_rope) if r is not None]
    fields["rope.share"] = c.rope.rotated(c.head_dim)
    fields["local_rope"] = None if c.local_rope is None else c.local_rope.kind
    return fields


def _differences(wanted: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """Return the names of fields that differ by more than float32 rounds."""
    return [name for name, value in wanted.items() if not _same(value, read[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    if isinstance(a, list | tuple) and len(a) == len(b):
        return all(map(_same, a, b))
    return bool(a == b)
