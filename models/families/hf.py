"""Hugging Face configurations and tensor names: `config.json` -> Arch, and a Spec of every tensor.

Names are given once, as pytrees of `Spec` with the structure of the parameters. Loading maps over
the specs, exporting zips two trees, and random initialisation is another map.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.arch import Arch, Block, NonBlockParams, linear_of
from models.errors import InputError
from models.families.fields import Fields, kind_of
from models.families.gemma import GEMMAS
from models.families.llama import LLAMAS
from models.families.mixtures import MIXTURES
from models.families.opt import OPT
from models.families.phi import PHIS
from models.families.specs import Family, Spec, is_spec

__all__ = [
    "FAMILIES",
    "Family",
    "Spec",
    "family",
    "is_spec",
    "linear_name",
    "narrower",
    "shallower",
    "specs",
    "text_config",
]

# model_type -> family.
FAMILIES: Mapping[str, Family] = {**LLAMAS, **MIXTURES, **PHIS, **GEMMAS, "opt": OPT}


# Fields of a larger model that hold for its text part too.
_SHARED = ("tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id", "bos_token_id")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the text part of a larger model, such as one that sees images.

    Args:
      config: Contents of `config.json`.

    Returns:
      The section `text_config`, with what the model says for all parts; `config` itself where it
      is a language model's or the section is none that Topiary reads.
    """
    section = config.get("text_config")
    if config.get("model_type") in FAMILIES or not isinstance(section, Mapping):
        return dict(config)
    kind = section.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return dict(config)
    shared = {name: config[name] for name in _SHARED if name in config}
    return {**shared, "architectures": [FAMILIES[kind].model_class], **section}


def family(config: Mapping[str, Any]) -> Family:
    """Return the family of a configuration.

    Args:
      config: Contents of `config.json`.

    Returns:
      Family that its `model_type` belongs to.

    Raises:
      InputError: The `model_type` is not supported, or the checkpoint is quantised.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind_of(config) not in FAMILIES:
        raise InputError(
            f"config.json: model_type {kind!r} is not supported",
            f"it must be one of {', '.join(sorted(FAMILIES))}",
        )
    # Quantised tensors have other names and types; scores need the real weights.
    if config.get("quantization_config"):
        raise InputError("config.json: the checkpoint is quantised", "save it dequantised first")
    return FAMILIES[kind_of(config)]


def specs(config: Mapping[str, Any]) -> tuple[Arch, NonBlockParams, tuple[Block, ...]]:
    """Describe the architecture and every tensor of a configuration.

    Args:
      config: Contents of `config.json`.

    Returns:
      Architecture, parameters outside the blocks and parameters of each block, with a Spec in
      place of every array.

    Raises:
      InputError: The configuration is wrong or not supported.
    """
    own = family(config)
    arch = own.arch(config)
    count = Fields(config).count("num_hidden_layers")
    return arch, own.non_block(arch.config), tuple(own.block(arch.config, i) for i in range(count))


def block_of_kind(config: Mapping[str, Any], i: int, sparse: bool) -> Block:
    """Return the specs that block i would have with experts or without.

    Args:
      config: Contents of `config.json` of a mixture of experts.
      i: Index of the block.
      sparse: True for a block with experts.
    """
    own = family(config)
    c = own.arch(config).config
    return own.block(dataclasses.replace(c, sparse=(sparse,) * len(c.windows)), i)


def linear_name(block: Block, slot: str) -> str:
    """Return the checkpoint name of a linear, such as "model.layers.0.mlp.up_proj".

    Args:
      block: Specs of a block.
      slot: Slot of the linear.
    """
    return linear_of(block, slot).w.name.removesuffix(".weight")


def narrower(config: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Return the configuration of the model with fewer channels of the residual stream.

    Args:
      config: Contents of `config.json`.
      dim: Channels that stay.
    """
    own = family(config)
    return {**config, **own.narrow(own.arch(config).config, dim)}


def shallower(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the configuration of the model that has only some blocks.

    Args:
      config: Contents of `config.json`.
      kept: Indices of the blocks that stay, in order.

    Returns:
      Configuration in which the settings of each block follow the block.
    """
    own, blocks = family(config), config["num_hidden_layers"]
    # Some families infer a setting from a block's number, which has changed.
    lists = own.lists(own.arch(config).config)
    # A list that the file has anyway follows its blocks too, whatever it says.
    for name in ("layer_types", *lists):
        given = config.get(name)
        if isinstance(given, list) and len(given) == blocks:
            lists[name] = given
    new = {**config, "num_hidden_layers": len(kept)}
    new |= {name: [values[i] for i in kept] for name, values in lists.items()}
    new |= own.renumber(own.arch(config).config, kept)
    widths = config.get("widths")
    if isinstance(widths, dict):
        new["widths"] = {name: [counts[i] for i in kept] for name, counts in widths.items()}
    return new
