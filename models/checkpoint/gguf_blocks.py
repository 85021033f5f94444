"""Blocks of a GGUF file: counts that differ between blocks, and parts that the file leaves out."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from models.checkpoint.gguf_fields import REMEDY
from models.checkpoint.gguf_file import GgufFile
from models.checkpoint.tensors import Entry
from models.errors import InputError
from models.families import hf
from models.families.fields import OWN

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


def ragged_fields(counts: BlockCounts, names: Iterable[str]) -> dict[str, Any]:
    """Return the fields of `config.json` that describe blocks of different sizes.

    Args:
      counts: Sizes of each block.
      names: Hugging Face names of the file's tensors.

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
        "biases": sorted(_biased(names) & {*_ATTENTION, *_FEED_FORWARD}),
    }


def bias_fields(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, bool]:
    """Return the fields for biases, of which the file has none: its tensors tell.

    Args:
      config: Fields of `config.json` that are known, with its `model_type`.
      names: Hugging Face names of the file's tensors.

    Returns:
      Each field of the family, true if one linear of its kind has a bias.
    """
    biased = _biased(names)
    return {flag: not biased.isdisjoint(modules) for flag, modules in _flagged(config).items()}


def _flagged(config: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the linears that each field of the family gives a bias."""
    family = hf.family(config)
    return {
        flag: {family.linears[slot] for slot in slots} for flag, slots in family.bias_flags.items()
    }


def _biased(names: Iterable[str]) -> set[str]:
    """Return the modules within a block that have a bias in any, such as "mlp.down_proj"."""
    return {_module(n) for n in names if n.endswith(".bias") and n.startswith("model.layers.")}


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
    for flag, modules in _flagged(config).items():
        biased |= modules if config.get(flag) else set()
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
