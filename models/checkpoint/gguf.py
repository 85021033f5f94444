"""`.gguf` files of the LLaMA and Qwen2 architectures as Hugging Face checkpoints: configuration, tensors, tokenizer.

llama.cpp stores what transformers does under other names, with three differences: the rows of LLaMA's query and key matrices are
ordered for interleaved rotary pairs, LLaMA 3's rotary scaling is a tensor of factors, and tied embeddings have no output matrix.
"""

import math
import pathlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from models.checkpoint.gguf_file import GgufFile, lazy, read_gguf
from models.checkpoint.gguf_vocab import build_tokenizer, tokenizer_config
from models.checkpoint.tensors import Entry, LazyTensors, Tensors
from models.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FACTORS = "rope_freqs.weight"
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_INSTEAD = "use the original Hugging Face checkpoint"


def open_gguf(path: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """A GGUF file as the `config.json` of transformers' LlamaConfig (or Qwen2Config) and tensors under its names.

    Raises InputError when the file is damaged, of another architecture, or holds what that configuration cannot say.
    """
    file = read_gguf(path)
    config = _config(file)
    rotary = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    entries = {}
    for name, stored in file.tensors.items():
        part, renamed = _name(file, name)
        if renamed is None:
            continue
        entries[renamed] = lazy(path, name, stored)
        if part in rotary and config["model_type"] == "llama":
            heads = rotary[part]
            if stored.shape[0] != heads * config["head_dim"]:
                raise InputError(
                    f"{path}: {name} has {stored.shape[0]} rows for {heads} heads of {config['head_dim']}: {_INSTEAD}"
                )
            entries[renamed] = _unpermuted(entries[renamed], heads)
    return config, LazyTensors(entries, path)


def gguf_tokenizer(path: pathlib.Path) -> "Tokenizer":
    """The tokenizer of a GGUF file, from its metadata; InputError when it is of a kind that is not known."""
    return build_tokenizer(read_gguf(path).metadata, path)


def gguf_tokenizer_config(path: pathlib.Path) -> dict[str, Any]:
    """The `tokenizer_config.json` that belongs to `gguf_tokenizer`: special tokens by role, and the chat template."""
    return tokenizer_config(read_gguf(path).metadata)


def _name(file: GgufFile, name: str) -> tuple[str, str | None]:
    """The part of the model a tensor is, and its Hugging Face name (None for the rotary factors, which are configuration)."""
    if name == _FACTORS:
        return "rope_freqs", None
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    block, part, kind = match.groups() if match else (None, "", "")
    known = _ENDS if block is None else _BLOCK
    if part not in known:
        raise InputError(
            f"{file.path}: tensor {name} is not part of a plain LLaMA or Qwen2 model: {_INSTEAD}"
        )
    return (
        part,
        f"{known[part]}.{kind}" if block is None else f"model.layers.{block}.{known[part]}.{kind}",
    )


def _unpermuted(entry: Entry, heads: int) -> Entry:
    """A query or key matrix or bias with rows rotated in pairs (i, i + d/2) of a head, as transformers does, not (2i, 2i + 1)."""

    def load() -> np.ndarray:
        stored = entry.load()  # [heads * d, ...]
        pairs = stored.reshape(heads, -1, 2, *stored.shape[1:])  # [heads, d/2, 2, ...]
        return pairs.swapaxes(1, 2).reshape(stored.shape)

    return Entry(entry.shape, load)


def _field(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    """A metadata value of the given type; InputError when it is missing without a default, or of another type."""
    value = file.metadata.get(key, default)
    if not isinstance(value, kind):
        raise InputError(
            f"{file.path}: metadata {key} is {value!r}, not one {kind.__name__}: {_INSTEAD}"
        )
    return value


def _config(file: GgufFile) -> dict[str, Any]:
    kind = _field(file, "general.architecture", str)
    if kind not in _ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {kind!r} is not read from GGUF, only {' and '.join(_ARCHITECTURES)}: {_INSTEAD}"
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(
            f"{file.path} holds no token_embd.weight: it is not a whole model; download it again"
        )

    def count(key: str, default: int | None = None) -> int:
        value = _field(file, f"{kind}.{key}", int, default)
        if value < 1:
            raise InputError(
                f"{file.path}: metadata {kind}.{key} is {value}, not a positive number: download it again"
            )
        return value

    width, heads = count("embedding_length"), count("attention.head_count")
    rotated = count("rope.dimension_count", count("attention.key_length", width // heads))
    if {count("attention.key_length", rotated), count("attention.value_length", rotated)} != {
        rotated
    }:
        raise InputError(
            f"{file.path}: keys, values and rotary dimensions differ in width, unlike LLaMA's and Qwen2's: {_INSTEAD}"
        )
    tokens = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in _TOKENS.items()
    }
    config = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": rotated,
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": _short(_field(file, f"{kind}.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": _rope(file, kind, rotated),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "dtype": "float32",
    }
    if kind == "llama":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
    return config | {name: token for name, token in tokens.items() if token is not None}


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(file: GgufFile, kind: str, rotated: int) -> dict[str, Any]:
    """transformers' `rope_parameters` for heads of `rotated` dimensions: plain, linear, or LLaMA 3's from its factors."""
    theta = _short(_field(file, f"{kind}.rope.freq_base", float, 10000.0))
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", "linear")
    factor = _field(
        file,
        f"{kind}.rope.scaling.factor",
        float,
        file.metadata.get(f"{kind}.rope.scale_linear", 0.0),
    )
    linear = scaling == "linear" and factor not in (0.0, 1.0)  # llama.cpp reads 0 as unscaled
    if scaling not in ("none", "linear") or (linear and _FACTORS in file.tensors):
        raise InputError(
            f"{file.path}: rotary scaling {scaling!r} is not read from GGUF, only linear or LLaMA 3's: {_INSTEAD}"
        )
    if _FACTORS in file.tensors:
        factors = lazy(file.path, _FACTORS, file.tensors[_FACTORS]).load().astype(np.float64)
        scaled = (
            _llama3(factors, theta)
            if factors.shape == (rotated // 2,) and (factors > 0.999).all()
            else None
        )
        if scaled is None:
            raise InputError(f"{file.path}: {_FACTORS} is not LLaMA 3's rotary scaling: {_INSTEAD}")
        return {"rope_theta": theta, **scaled}
    return {"rope_theta": theta, "rope_type": "default"} | (
        {"rope_type": "linear", "factor": _short(factor)} if linear else {}
    )


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """LLaMA 3's scaling from the factors [d/2], 1 and above, that divide each rotary frequency; None when they are not its.

    With λ the wavelength, the factor is 1 / ((1 - s)/f + s), s = (L/λ - low) / (high - low) clipped to [0, 1] (transformers'
    `_compute_llama3_parameters`). Where 0 < s < 1, s is a straight line in 1/λ, which gives L/low and high/low; every released
    model has low = 1.
    """
    if np.allclose(factors, 1):
        return {"rope_type": "default"}
    waves = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # 1/λ
    scale = factors.max()
    smooth = (1 / factors - 1 / scale) / (1 - 1 / scale)
    inner = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if inner.sum() < 2:
        return None
    slope, intercept = np.polyfit(waves[inner], smooth[inner], 1)
    if slope <= 0 or intercept >= 0:
        return None
    high = round(1 - 1 / intercept, 2)
    length = round(slope * (high - 1))
    line = np.clip((length * waves - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - line) / scale + line), factors, rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(float(scale), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": length,
    }
