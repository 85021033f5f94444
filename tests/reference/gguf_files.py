"""GGUF files of tiny models, written with the `gguf` package as llama.cpp's converters write them.

Names of tensors come from the package's own map. What differs by architecture follows
`conversion/*.py` of llama.cpp.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from models.arch import Model
from models.checkpoint.fused import join
from models.families import hf
from reference import tiny

# model_type -> architecture of the file.
ARCHITECTURES = {"phi": "phi2", "gemma3_text": "gemma3"}
_PERMUTED = ("llama", "granite", "smollm3")
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the converter writes, without the architecture's name."""
    kind, heads = config["model_type"], config["num_attention_heads"]
    rope = dict(config.get("rope_parameters") or {})
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    partial = 0.5 if kind == "phi" else 1.0
    found: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    if kind == "phi":
        found["attention.layer_norm_epsilon"] = config.get("layer_norm_eps", 1e-5)
    else:
        eps = 1e-5 if kind in ("phi3", "olmo2") else 1e-6
        found["attention.layer_norm_rms_epsilon"] = config.get("rms_norm_eps", eps)
    if kind not in ("phi", "gemma", "gemma2"):
        theta = {"smollm3": 2e6, "gemma3_text": 1e6}.get(kind, 10000.0)
        found["rope.freq_base"] = float(rope.get("rope_theta", theta))
    if kind in ("phi", "phi3", *_PERMUTED):
        found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", partial))
    if "head_dim" in config:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if kind == "granite":
        found |= {key: float(config[name]) for name, key in _GRANITE.items()}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        default = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[name]
        if kind == "gemma2" or name in config:
            found[name] = float(config.get(name, default))
    if kind in ("gemma2", "gemma3_text", "phi3"):
        found["attention.sliding_window"] = config.get("sliding_window") or 0
    return found | _scaling(config, rope)


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary scaling."""
    longest = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings", longest)
    kind = rope.get("rope_type", "default")
    if config["model_type"] == "phi3":
        found = {"rope.scaling.original_context_length": original}
        if kind == "longrope":
            scale = math.log(longest / original) / math.log(original)
            found["rope.scaling.attn_factor"] = math.sqrt(1 + scale)
        return found
    if kind not in ("linear", "yarn"):
        return {}
    found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = original
        names = {"attention_factor": "attn_factor"} | {
            f"beta_{b}": f"beta_{b}" for b in ("fast", "slow")
        }
        found |= {f"rope.scaling.yarn_{to}": float(rope[n]) for n, to in names.items() if n in rope}
    return found


def tensors(config: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """Return the tensors of a model under the file's names, as the converter changes them."""
    kind, blocks = config["model_type"], config["num_hidden_layers"]
    state = tiny.state_of(config, model)
    state = join(state, list(state))
    code = {name: code for code, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(code[ARCHITECTURES.get(kind, kind)], blocks)
    c = hf.family(config).arch(config).config
    found = {}
    for name, value in state.items():
        if kind in _PERMUTED and ("q_proj" in name or "k_proj" in name):
            value = value.reshape(-1, 2, c.head_dim // 2, *value.shape[1:]).swapaxes(1, 2)
            value = value.reshape(state[name].shape)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        found[target] = value
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            found[f"rope_factors_{length}.weight"] = factors
    return found


def write(
    path: pathlib.Path,
    config: Mapping[str, Any],
    stored: Mapping[str, np.ndarray],
    **more: Any,
) -> pathlib.Path:
    """Write a file of float32 tensors; `more` replace settings, None removes one."""
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (settings(config) | more).items():
        if value is not None:
            name = key if key.startswith("tokenizer.") else f"{arch}.{key}"
            add[type(value)](name, value)
    for name, value in stored.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
