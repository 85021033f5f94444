"""GGUF files of the LLaMA, Qwen2 and Deci architectures as Hugging Face checkpoints.

llama.cpp stores the same parameters under other names, with these differences. Rows of LLaMA's
query and key matrices are ordered for interleaved rotary pairs. LLaMA 3's rotary scaling is a
tensor of factors. Tied embeddings have no output matrix. Deci is LLaMA with blocks that differ in
width or lack a part.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from models.checkpoint.gguf_blocks import (
    REMEDY,
    BlockCounts,
    bias_fields,
    fill_absent,
    ragged_fields,
    read_counts,
)
from models.checkpoint.gguf_file import GgufFile, lazy, read_gguf
from models.checkpoint.gguf_names import BLOCK, NON_BLOCK, RAGGED, ROPE_FACTORS, TOKENS
from models.checkpoint.gguf_vocab import build_tokenizer, tokenizer_config
from models.checkpoint.tensors import Entry, LazyTensors, Tensors
from models.errors import InputError
from models.untrusted import LARGEST, is_count, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Architecture -> class of the stock configuration; blocks of RAGGED fit no stock one.
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", RAGGED: ""}


def open_gguf(path: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """Open a GGUF file as a configuration and tensors of transformers' Llama or Qwen2.

    Args:
      path: The `.gguf` file.

    Returns:
      Contents of the `config.json`, and the tensors under Hugging Face names.

    Raises:
      InputError: The file is damaged, of another architecture, or not expressible as such a
        configuration.
    """
    file = read_gguf(path)
    kind = _architecture(file)
    entries, rotary = {}, {}
    for name, stored in file.tensors.items():
        part, renamed = _name(file, name)
        if renamed is None:
            continue
        # Nothing is read or dequantised before a block is asked for.
        entries[renamed] = lazy(path, name, stored)
        # llama.cpp reorders LLaMA's rotary rows when it converts, but not Qwen2's.
        if part in ("attn_q", "attn_k") and kind != "qwen2":
            rotary[renamed] = name
    counts = None
    if kind == RAGGED:
        counts = read_counts(file, kind, _count(file, f"{kind}.block_count"))
    config = _config(file, kind, counts, entries)
    for renamed, name in rotary.items():
        entries[renamed] = _unpermuted(entries[renamed], config["head_dim"], f"{path}: {name}")
    fill_absent(entries, config, counts)
    return config, LazyTensors(entries, path)


def gguf_tokenizer(path: pathlib.Path) -> "Tokenizer":
    """Build the tokenizer of a GGUF file from its metadata.

    Args:
      path: The `.gguf` file.

    Returns:
      Tokenizer.

    Raises:
      InputError: The kind of tokenizer is not known.
    """
    return build_tokenizer(read_gguf(path).metadata, path)


def gguf_tokenizer_config(path: pathlib.Path) -> dict[str, Any]:
    """Return the `tokenizer_config.json` that belongs to `gguf_tokenizer`.

    Args:
      path: The `.gguf` file.

    Returns:
      Special tokens by role, and the chat template.
    """
    return tokenizer_config(read_gguf(path).metadata)


def _name(file: GgufFile, name: str) -> tuple[str, str | None]:
    """Return the part of the model that a tensor is, and its Hugging Face name or None."""
    if name == ROPE_FACTORS:
        # Rotary factors become part of the configuration.
        return "rope_freqs", None
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    block, part, kind = match.groups() if match else (None, "", "")
    known = NON_BLOCK if block is None else BLOCK
    if part not in known:
        raise InputError(
            f"{file.path}: tensor {name} is not part of a plain LLaMA or Qwen2 model", REMEDY
        )
    prefix = "" if block is None else f"model.layers.{block}."
    return part, f"{prefix}{known[part]}.{kind}"


def _unpermuted(entry: Entry, head_dim: int, where: str) -> Entry:
    """Reorder the rows of a LLaMA query or key from rotary pairs (2i, 2i + 1) to (i, i + d/2)."""
    if entry.shape[0] % head_dim:
        raise InputError(
            f"{where} has {entry.shape[0]} rows, which are no whole heads of {head_dim}", REMEDY
        )

    def load() -> np.ndarray:
        stored = entry.load()  # [heads * d, ...]
        pairs = stored.reshape(-1, head_dim // 2, 2, *stored.shape[1:])  # [heads, d/2, 2, ...]
        return pairs.swapaxes(1, 2).reshape(stored.shape)

    return Entry(entry.shape, load, dtype=entry.dtype)


def _field(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    """Return a metadata value of the given type; InputError if it is absent or of another type."""
    value = file.metadata.get(key, default)
    if type(value) is not kind:
        raise InputError(
            f"{file.path}: metadata {key} is {shown(value)}, not one {kind.__name__}", REMEDY
        )
    return value


def _architecture(file: GgufFile) -> str:
    """Return the architecture of a whole model; InputError if it is not read."""
    kind = _field(file, "general.architecture", str)
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {shown(kind)} is not read from GGUF, only "
            f"{', '.join(_ARCHITECTURES)}",
            REMEDY,
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(
            f"{file.path} holds no token_embd.weight, so it is not a whole model",
            "download it again",
        )
    return kind


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    """Return a positive count of the metadata; InputError if it is none."""
    value = _field(file, key, int, default)
    if not is_count(value):
        raise InputError(
            f"{file.path}: metadata {key} is {value}, not a positive number of 32 bits",
            "download it again",
        )
    return value


def _number(file: GgufFile, key: str, default: float | None = None, least: float = 1e-30) -> float:
    """Return a number of the metadata, in the shortest decimal of the same float32."""
    value = _field(file, key, float, default)
    if not least <= value <= LARGEST:
        raise InputError(
            f"{file.path}: metadata {key} is {value}, not a positive number", "download it again"
        )
    # 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value)))


def _head_dim(file: GgufFile, kind: str, default: int) -> int:
    """Return the size of a head, which keys, values and rotary dimensions must share."""
    rotated = _count(
        file,
        f"{kind}.rope.dimension_count",
        _count(file, f"{kind}.attention.key_length", default),
    )
    keys = _count(file, f"{kind}.attention.key_length", rotated)
    values = _count(file, f"{kind}.attention.value_length", rotated)
    if keys != rotated or values != rotated:
        raise InputError(
            f"{file.path}: keys, values and rotary dimensions differ in width, unlike LLaMA's and "
            "Qwen2's",
            REMEDY,
        )
    return rotated


def _config(
    file: GgufFile, kind: str, counts: BlockCounts | None, entries: Mapping[str, Entry]
) -> dict[str, Any]:
    """Return the `config.json` of a file."""
    width = _count(file, f"{kind}.embedding_length")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": width,
    }
    if counts is None:
        heads = _count(file, f"{kind}.attention.head_count")
        config["intermediate_size"] = _count(file, f"{kind}.feed_forward_length")
        config["num_attention_heads"] = heads
        config["num_key_value_heads"] = _count(file, f"{kind}.attention.head_count_kv", heads)
    else:
        config |= ragged_fields(counts, entries)
        heads = config["num_attention_heads"]
    # Absent lengths follow from the hidden size, as in llama.cpp.
    head_dim = _head_dim(file, kind, width // heads)
    config |= {
        "num_hidden_layers": _count(file, f"{kind}.block_count"),
        "head_dim": head_dim,
        "max_position_embeddings": _count(file, f"{kind}.context_length"),
        "rms_norm_eps": _number(file, f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, kind, head_dim),
        # A head that equals the embedding is left out of the file.
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "dtype": "float32",
    }
    if kind == "llama":
        # The file has no field for biases: the tensors tell.
        config |= bias_fields(entries)
    for name, key in TOKENS.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        # As in llama.cpp, an id that is none counts as absent.
        if is_count(token, 0):
            config[f"{name}_token_id"] = token
    return config


def _rope(file: GgufFile, kind: str, rotated: int) -> dict[str, Any]:
    """Return transformers' `rope_parameters` for heads of `rotated` dimensions."""
    theta = _number(file, f"{kind}.rope.freq_base", 10000.0)
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", "linear")
    # Older files say scale_linear instead of scaling.factor.
    older = _number(file, f"{kind}.rope.scale_linear", 0.0, least=0.0)
    factor = _number(file, f"{kind}.rope.scaling.factor", older, least=0.0)
    # llama.cpp reads a factor of 0 as unscaled.
    is_linear = scaling == "linear" and factor not in (0.0, 1.0)
    stored = file.tensors.get(ROPE_FACTORS)
    if scaling not in ("none", "linear") or (is_linear and stored is not None):
        raise InputError(
            f"{file.path}: rotary scaling {shown(scaling)} is not read from GGUF, only linear or "
            "LLaMA 3's",
            REMEDY,
        )
    if stored is not None:
        factors = lazy(file.path, ROPE_FACTORS, stored).load().astype(np.float64)
        # Stored in float32, a factor of 1 may be a little below.
        plausible = (
            factors.shape == (rotated // 2,) and 0.999 < factors.min() <= factors.max() < 1e9
        )
        scaled = _llama3(factors, theta) if plausible else None
        if scaled is None:
            raise InputError(f"{file.path}: {ROPE_FACTORS} is not LLaMA 3's rotary scaling", REMEDY)
        return {"rope_theta": theta, **scaled}
    if is_linear:
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_type": "default"}


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Recover LLaMA 3's scaling from the factors [d/2] that divide the rotary frequencies.

    With λ the wavelength, the factor is 1 / ((1 - s)/f + s), s = (L/λ - low) / (high - low) clipped
    to [0, 1]. Where 0 < s < 1, s is a straight line in 1/λ, which gives L/low and high/low. Every
    published model has low = 1.

    Source: transformers' `_compute_llama3_parameters`.

    Args:
      factors: Factors of 1 and above, float64 [d/2].
      theta: Base of the frequencies.

    Returns:
      Fields of `rope_parameters`; None if the factors are of another scaling.
    """
    # Factors of one scale nothing.
    if np.allclose(factors, 1):
        return {"rope_type": "default"}
    inverse_waves = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # 1/λ
    scale = factors.max()
    smooth = (1 / factors - 1 / scale) / (1 - 1 / scale)
    inner = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if inner.sum() < 2:
        # Two points are needed to find the line.
        return None
    slope, intercept = np.polyfit(inverse_waves[inner], smooth[inner], 1)
    # An intercept next to 0 would stand for frequencies without bound.
    if slope <= 0 or intercept >= -1e-6:
        return None
    high = round(1 - 1 / intercept, 2)
    length = round(slope * (high - 1))
    # Both were rounded to what a configuration would say; the factors must follow from them.
    line = np.clip((length * inverse_waves - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - line) / scale + line), factors, rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(float(scale), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": length,
    }
