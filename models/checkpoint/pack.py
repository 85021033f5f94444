"""Checkpoints without their zeros: written beside the dense weights, read like any other.

The folder `packed` holds a whole checkpoint of our own. Its `packed*.safetensors` have the tensors
of the dense files one for one; matrices of the blocks' linears are stored as
`models.checkpoint.pack_formats` says, and the file's header names their shapes.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from models.checkpoint.block_specs import linear_weights
from models.checkpoint.companions import copy_companions, write_json
from models.checkpoint.formats import packed_entries, read_weight_map
from models.checkpoint.own_code import CODE
from models.checkpoint.pack_formats import PACKINGS, Packing
from models.checkpoint.reader import read_config
from models.checkpoint.tensors import save_tensors
from models.errors import InputError
from models.untrusted import UserFile

FOLDER = "packed"
# Stems of the weight files, dense and packed; shards' numbers and the index follow.
DENSE, PACKED = "model", "packed"


class PackSizes(NamedTuple):
    """Sizes of a pack.

    Attributes:
      dense: Bytes of the dense weight files.
      packed: Bytes of the packed ones.
      linears_dense: Bytes of the matrices that were packed.
      linears_packed: Bytes that they take.
    """

    dense: int
    packed: int
    linears_dense: int
    linears_packed: int


def pack(directory: str | os.PathLike[str], packing: str) -> PackSizes:
    """Write a checkpoint's weights without their zeros, into its folder `packed`.

    Args:
      directory: Checkpoint directory with safetensors.
      packing: A key of `models.checkpoint.pack_formats.PACKINGS`.

    Returns:
      Sizes before and after.

    Raises:
      InputError: There is no such packing, a file is damaged, or the directory has no safetensors.
    """
    if packing not in PACKINGS:
        raise InputError(
            "is no packing", f"choose of {', '.join(PACKINGS)}", field="pack", value=packing
        )
    directory = pathlib.Path(directory)
    config = read_config(directory)
    linears = set(linear_weights(config))
    target = directory / FOLDER
    if target.exists():
        raise InputError(f"{target} exists already", "remove it first")
    target.mkdir()
    files = _weight_files(directory, DENSE)
    matrices = [0, 0]
    for file in files:
        stored: dict[str, np.ndarray] = {}
        shapes: dict[str, list[int]] = {}
        for tensor, value in load_file(file).items():
            parts = _packed(tensor, value, PACKINGS[packing]) if tensor in linears else {}
            if parts:
                shapes[tensor] = list(value.shape)
                matrices[0] += value.nbytes
                matrices[1] += sum(x.nbytes for x in parts.values())
            stored |= parts or {tensor: value}
        header = {"packing": packing, "shapes": json.dumps(shapes)}
        save_tensors(stored, target / _renamed(file.name, DENSE, PACKED), header)
    _copy_rest(directory, target, config, (DENSE, PACKED))
    packed = sum(f.stat().st_size for f in _weight_files(target, PACKED))
    return PackSizes(sum(f.stat().st_size for f in files), packed, *matrices)


def _packed(name: str, value: np.ndarray, packing: Packing) -> dict[str, np.ndarray]:
    """Return the stored tensors of a matrix; empty if it is better stored as it is."""
    parts = packing.pack(value)
    if not packing.always and sum(x.nbytes for x in parts) >= value.nbytes:
        return {}
    return {name.removesuffix(".weight") + p: x for p, x in zip(packing.parts, parts, strict=True)}


def _weight_files(directory: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """List the weight files of a directory; InputError if there are none."""
    files = sorted(f for f in directory.glob(f"{stem}*.safetensors") if f.is_file())
    if not files:
        raise InputError(
            f"{directory} has no {stem}.safetensors", "give the directory of such a checkpoint"
        )
    return files


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old)


def _copy_rest(
    source: pathlib.Path, target: pathlib.Path, config: Mapping[str, Any], stems: tuple[str, str]
) -> None:
    """Copy everything but the weights: configuration, code, tokenizer, and the shards' index."""
    for name in ("config.json", CODE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    copy_companions(source, target, config)
    old, new = (f"{stem}.safetensors.index.json" for stem in stems)
    if (source / old).is_file():
        index = UserFile(source / old).read_json()
        files = read_weight_map(source / old).items()
        index["weight_map"] = {tensor: _renamed(file, *stems) for tensor, file in files}
        write_json(target / new, index)


def unpack(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a packed checkpoint as the dense one that it was made from, to the byte.

    Args:
      source: Directory with `packed*.safetensors`.
      target: New directory.

    Raises:
      InputError: A file is damaged, or the directory holds no packed checkpoint.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    config, files = read_config(source), _weight_files(source, PACKED)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        tensors = {name: entry.load() for name, entry in packed_entries(file).items()}
        save_tensors(tensors, target / _renamed(file.name, PACKED, DENSE))
    _copy_rest(source, target, config, (PACKED, DENSE))
