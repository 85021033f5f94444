"""Blocks of a GGUF file: counts that differ between blocks, and parts that the file leaves out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from models.checkpoint.gguf_file import GgufFile
from models.checkpoint.tensors import Entry
from models.errors import InputError
from models.families import hf
from models.families.fields import OWN

REMEDY = "use the original Hugging Face checkpoint"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class BlockCounts(NamedTuple):
    """Sizes of each block, 0 for a part that is absent.

    Attributes:
      heads: Query heads.
      kv_heads: Key-value heads.
      neurons: Neurons of the feed-forward part.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


def read_counts(file: GgufFile, kind: str, blocks: int) -> BlockCounts:
    """Read the sizes of blocks that may differ.

    Args:
      file: The file.
      kind: Its architecture.
      blocks: Number of blocks.

    Returns:
      Sizes of each block.

    Raises:
      InputError: A list has another length, a count is no number of 0 or more, or query heads share
        key-value heads in another way than LLaMA's.
    """
    # Bounded before anything is built for each block.
    if blocks > len(file.tensors):
        raise InputError(
            f"{file.path} names {blocks} blocks and holds {len(file.tensors)} tensors",
            "download it again",
        )
    heads = _per_block(file, f"{kind}.attention.head_count", blocks)
    counts = BlockCounts(
        heads,
        _per_block(file, f"{kind}.attention.head_count_kv", blocks, heads),
        _per_block(file, f"{kind}.feed_forward_length", blocks),
    )
    pairs = zip(counts.heads, counts.kv_heads, strict=True)
    # Blocks without attention have 0 of both. Query heads alone are Deci's linear attention.
    ratios = {n / k if k else 0.0 for n, k in pairs if (n, k) != (0, 0)}
    if len(ratios) != 1 or not min(ratios).is_integer() or min(ratios) < 1:
        raise InputError(
            f"{file.path}: the query heads that share a key-value head differ between blocks",
            REMEDY,
        )
    return counts


def _per_block(
    file: GgufFile, key: str, blocks: int, default: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return a count of each block, from a list or from one number for all."""
    value = file.metadata.get(key, default)
    values = value if isinstance(value, list | tuple) else [value] * blocks
    # `type` rather than isinstance: True is an int too.
    if len(values) != blocks or any(type(n) is not int or n < 0 for n in values):
        raise InputError(
            f"{file.path}: metadata {key} is not one count of 0 or more for each of {blocks} "
            "blocks",
            "download it again",
        )
    return tuple(values)


def ragged_fields(counts: BlockCounts, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the fields of `config.json` that describe blocks of different sizes.

    Args:
      counts: Sizes of each block.
      entries: Tensors of the file under Hugging Face names.

    Returns:
      Fields of our own type; an absent part counts as one unit, which `fill_absent` makes zero.
    """
    kv_heads = max(counts.kv_heads)
    ratio = max(counts.heads) // kv_heads
    return {
        "model_type": f"{OWN}llama",
        "architectures": ["PrunedForCausalLM"],
        "num_attention_heads": kv_heads * ratio,
        "num_key_value_heads": kv_heads,
        "intermediate_size": max(1, *counts.neurons),
        "widths": {
            "heads": [max(1, n) for n in counts.kv_heads],
            "neurons": [max(1, n) for n in counts.neurons],
        },
        "biases": sorted(_biased(entries)),
    }


def bias_fields(entries: Mapping[str, Entry]) -> dict[str, bool]:
    """Return LLaMA's fields for biases.

    Args:
      entries: Tensors of the file under Hugging Face names.

    Returns:
      `attention_bias` and `mlp_bias`, each true if one linear of its kind has a bias.
    """
    biased = _biased(entries)
    return {
        "attention_bias": not biased.isdisjoint(_ATTENTION),
        "mlp_bias": not biased.isdisjoint(_FEED_FORWARD),
    }


def _biased(entries: Mapping[str, Entry]) -> set[str]:
    """Return the linears that have a bias in any block, such as "mlp.down_proj"."""
    modules = {_module(name) for name in entries if name.endswith(".bias")}
    return modules & {*_ATTENTION, *_FEED_FORWARD}


def _module(name: str) -> str:
    """Return a tensor's module within its block."""
    return name.rpartition(".")[0].split(".", 3)[-1]


def fill_absent(
    entries: dict[str, Entry], config: Mapping[str, Any], counts: BlockCounts | None
) -> None:
    """Add what the file leaves out because it does nothing: biases of zeros, empty parts.

    Args:
      entries: Tensors under Hugging Face names; changed.
      config: Contents of the `config.json`.
      counts: Sizes of each block; None where no part can be absent.
    """
    biased = _biased(entries)
    if config.get("attention_bias"):
        biased |= set(_ATTENTION)
    if config.get("mlp_bias"):
        biased |= set(_FEED_FORWARD)
    if counts is not None:
        for block, kv_heads, neurons in zip(
            hf.specs(config)[2], counts.kv_heads, counts.neurons, strict=True
        ):
            absent: tuple[str, ...] = () if kv_heads else ("input_layernorm", *_ATTENTION)
            absent += () if neurons else ("post_attention_layernorm", *_FEED_FORWARD)
            for spec in jax.tree.leaves(block, is_leaf=hf.is_spec):
                if _module(spec.name) in absent:
                    entries.setdefault(spec.name, _zeros(spec.shape))
    for name, entry in list(entries.items()):
        if name.endswith(".weight") and _module(name) in biased:
            bias = name.removesuffix("weight") + "bias"
            entries.setdefault(bias, _zeros(entry.shape[:1]))


def _zeros(shape: tuple[int, ...]) -> Entry:
    """Return a tensor of zeros that takes no memory until it is read."""
    return Entry(shape, lambda: np.zeros(shape, np.float32))
