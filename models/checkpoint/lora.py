"""LoRA adapters as peft writes them, merged into the checkpoint that they were trained on.

Sources: Hu et al., LoRA (https://arxiv.org/abs/2106.09685); Kalajdzievski, rsLoRA
(https://arxiv.org/abs/2312.03732), for the scale with the rank's root.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from models.checkpoint.formats import safetensors_entries
from models.checkpoint.hub import ADAPTER
from models.checkpoint.stored import HEAD
from models.checkpoint.tensors import WHOLE, Entry, Tensors
from models.errors import InputError
from models.untrusted import UserFile, is_count, shown, shown_text

CONFIG = "adapter_config.json"
ELSEWHERE = "merge it with peft's merge_and_unload, and take the merged checkpoint"
# peft's classes around the model put this before every name.
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings that train or compute something else than one product for each linear.
_OTHER_KINDS = (
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "velora_config", "monteclora_config", "megatron_config"),
)
# Starting points that leave the weights as they were; the others change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Names without characters that a regular expression gives a meaning of its own, but for the dot.
_PLAIN_NAME = re.compile(r"[\w.-]+")


class Factors(NamedTuple):
    """The two factors of a linear's change, which is `scale * up @ down`.

    Attributes:
      down: lora_A [rank in].
      up: lora_B [out rank].
      scale: Factor of the product.
    """

    down: Entry
    up: Entry
    scale: float


class Merged:
    """`Tensors` of a checkpoint, each with its part of an adapter merged in when it is read.

    Args:
      tensors: Tensors of the checkpoint that the adapter was trained on.
      factors: Factors by the name of the tensor that they change.
    """

    def __init__(self, tensors: Tensors, factors: Mapping[str, Factors]):
        self._tensors = tensors
        self.factors = factors
        self.shapes = tensors.shapes
        self.dtypes = tensors.dtypes

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """Read a merged tensor or some of its rows, see `Tensors.read`.

        Args:
          name: Name of the tensor.
          rows: Rows to read.

        Returns:
          Tensor in the checkpoint's dtype, merged in float32 at least.
        """
        weight = self._tensors.read(name, rows)
        if name not in self.factors:
            return weight
        own = self.factors[name]
        down, up = own.down.load().astype(np.float32), own.up.load()[rows].astype(np.float32)
        wide = weight.astype(np.promote_types(weight.dtype, np.float32))
        return (wide + np.float32(own.scale) * (up @ down)).astype(weight.dtype)


def is_adapter(directory: pathlib.Path) -> bool:
    """Return whether a directory holds an adapter.

    Args:
      directory: The directory.
    """
    return (directory / CONFIG).is_file()


def open_merged(tensors: Tensors, directory: pathlib.Path, tied: bool) -> Merged:
    """Open an adapter, checking every name and shape before any weight is read.

    Args:
      tensors: Tensors of the checkpoint that the adapter was trained on.
      directory: Directory of the adapter.
      tied: True if the checkpoint's embedding serves as its head.

    Returns:
      The checkpoint's tensors with the adapter merged in.

    Raises:
      InputError: The adapter is no plain LoRA, belongs to another checkpoint, or is damaged.
    """
    config = UserFile(directory / CONFIG, remedy="save the adapter again").read_json()
    _check_plain(directory / CONFIG, config)
    file = directory / ADAPTER
    if not file.is_file():
        raise InputError(f"{directory} has no {ADAPTER}", "save the adapter in safetensors")
    entries = safetensors_entries(file)
    pairs: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        match = _FACTOR.fullmatch(name)
        if not match:
            raise InputError(
                f"{file}: tensor {shown_text(name)} is no part of plain LoRA", ELSEWHERE
            )
        pairs.setdefault(match[1], {})[match[2]] = entry
    factors = {}
    for module, pair in pairs.items():
        weight = f"{module}.weight"
        if tied and weight == HEAD:
            raise InputError(
                f"{file} changes {module}, which the checkpoint shares with its embedding",
                "train the adapter on the blocks' linears alone",
            )
        factors[weight] = _factors(file, config, module, pair, tensors.shapes.get(weight))
    return Merged(tensors, factors)


def _check_plain(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Check that an adapter is LoRA on linears and nothing else; InputError if not."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file}: peft_type {shown(kind)} is not LORA", ELSEWHERE)
    others = {name: config[name] for name in _OTHER_KINDS if config.get(name)}
    if config.get("bias") not in (None, "none"):
        others["bias"] = config["bias"]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        others["init_lora_weights"] = config["init_lora_weights"]
    for name, value in others.items():
        raise InputError(f"{file}: {name} {shown(value)} is not plain LoRA", ELSEWHERE)


def _factors(
    file: pathlib.Path,
    config: Mapping[str, Any],
    module: str,
    pair: Mapping[str, Entry],
    shape: tuple[int, ...] | None,
) -> Factors:
    """Return the factors of a linear of a given shape; InputError if they do not fit it."""
    name = shown_text(module)
    if pair.keys() != {"A", "B"}:
        raise InputError(f"{file}: {name} lacks lora_A or lora_B", "save the adapter again")
    if shape is None or len(shape) != 2:
        raise InputError(
            f"{file} changes {name}, which is no linear of the pruned checkpoint",
            "give the checkpoint that the adapter was trained on",
        )
    down, up = pair["A"], pair["B"]
    rank = down.shape[0] if down.shape else 0
    if not rank or (down.shape, up.shape) != ((rank, shape[1]), (shape[0], rank)):
        raise InputError(
            f"{file}: lora_A {list(down.shape)} and lora_B {list(up.shape)} of {name} do not fit "
            f"the pruned checkpoint's {list(shape)}",
            "give the checkpoint that the adapter was trained on",
        )
    alpha = _alpha(file, config, module)
    # The rank itself is seen in the factors.
    return Factors(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(file: pathlib.Path, config: Mapping[str, Any], module: str) -> float:
    """Return the alpha of a module, which a pattern may set for some modules alone."""
    patterns = config.get("alpha_pattern") or {}
    # peft reads regular expressions here, which a file from elsewhere may make endless.
    if not isinstance(patterns, dict) or not all(map(_PLAIN_NAME.fullmatch, patterns)):
        raise InputError(f"{file}: alpha_pattern is no plain list of modules", ELSEWHERE)
    named = (alpha for name, alpha in patterns.items() if f".{module}".endswith(f".{name}"))
    alpha = next(named, config.get("lora_alpha", 8))  # peft's own default
    if not (is_count(alpha, 0) or (isinstance(alpha, float) and math.isfinite(alpha))):
        raise InputError(f"{file}: lora_alpha {shown(alpha)} is no number", "save it again")
    return float(alpha)
