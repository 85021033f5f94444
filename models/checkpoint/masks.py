"""Zeros of a pruned checkpoint in one that was fine-tuned from it: counted, and put back."""

import os
import pathlib
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models.checkpoint import lora
from models.checkpoint.block_specs import linear_weights
from models.checkpoint.companions import copy_companions
from models.checkpoint.formats import open_tensors, weight_files
from models.checkpoint.own_code import CODE, own_code
from models.checkpoint.pack import PACKED
from models.checkpoint.reader import read_config
from models.checkpoint.stored import stored_names, text_part, with_prefix
from models.checkpoint.tensors import Tensors
from models.errors import InputError
from models.families import hf
from models.families.fields import OWN
from models.progress import Progress, no_progress
from models.untrusted import parse_json

# Where the blocks lie, such as "model.layers.".
_BLOCKS = re.compile(r".*?\blayers\.")
_INDEX = "model.safetensors.index.json"


class Zeros(NamedTuple):
    """Zeros of a linear in two checkpoints.

    Attributes:
      entries: Entries of its matrix.
      pruned: Zeros in the pruned checkpoint.
      finetuned: Zeros in the fine-tuned one.
      lost: Zeros of the pruned checkpoint that the fine-tuned one has other values for.
    """

    entries: int
    pruned: int
    finetuned: int
    lost: int


class Restored(NamedTuple):
    """What `restore_zeros` found.

    Attributes:
      zeros: Zeros by linear, before they were put back.
      remarks: Sentences about files that were not copied.
    """

    zeros: dict[str, Zeros]
    remarks: tuple[str, ...]


class _Pair(NamedTuple):
    """A pruned checkpoint and a fine-tuned one, opened.

    Attributes:
      linears: Names of the matrices of the blocks' linears.
      pruned: Tensors of the pruned checkpoint.
      finetuned: Tensors of the fine-tuned one, an adapter merged in.
      changed: Names of the tensors that may differ from the files of `source`.
      source: Directory whose files the restored checkpoint gets.
      stored: Name of each tensor in those files.
      companions: Directories of the tokenizer and other files; later ones win.
    """

    linears: Sequence[str]
    pruned: Tensors
    finetuned: Tensors
    changed: frozenset[str]
    source: pathlib.Path
    stored: Mapping[str, str]
    companions: Sequence[pathlib.Path]


def lost_zeros(
    pruned: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    progress: Progress = no_progress,
) -> dict[str, Zeros]:
    """Count the zeros of a pruned checkpoint that a fine-tuned one has lost, one linear at a time.

    Args:
      pruned: Directory of the pruned checkpoint.
      finetuned: Directory of the checkpoint that was fine-tuned from it, or of a LoRA adapter,
        which counts as merged.
      progress: Shows the progress.

    Returns:
      Zeros by linear, such as "model.layers.0.mlp.up_proj", in the model's order.

    Raises:
      InputError: A file is missing or damaged, or the two do not belong together.
    """
    pair = _open(pathlib.Path(pruned), pathlib.Path(finetuned))
    advance = progress("comparing zeros", len(pair.linears), unit="linears")
    zeros = {}
    for name in pair.linears:
        zeros[name.removesuffix(".weight")] = _restored(pair, name)[0]
        advance()
    return zeros


def restore_zeros(
    pruned: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Progress = no_progress,
) -> Restored:
    """Write a fine-tuned checkpoint with the zeros of the pruned one, one tensor at a time.

    Files, types and names are those of the fine-tuned checkpoint. An adapter is merged into those
    of the pruned one.

    Args:
      pruned: As for `lost_zeros`.
      finetuned: As for `lost_zeros`.
      target: New directory.
      progress: Shows the progress.

    Returns:
      Zeros by linear before they were put back, and remarks.

    Raises:
      InputError: As for `lost_zeros`, or the files to write are no safetensors.
    """
    pair, target = _open(pathlib.Path(pruned), pathlib.Path(finetuned)), pathlib.Path(target)
    files = weight_files(pair.source)
    _check_files(pair.source, files)
    target.mkdir(parents=True, exist_ok=True)
    advance = progress("restoring zeros", len(pair.changed), unit="tensors")
    names = {pair.stored[name]: name for name in pair.changed}
    zeros = {}
    for file in files:
        copy = target / file.relative_to(pair.source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        with copy.open("r+b") as out:
            for stored, begin in _offsets(copy):
                if stored in names:
                    name = names.pop(stored)
                    zeros[name], value = _restored(pair, name)
                    out.seek(begin)
                    out.write(value.tobytes())
                    advance()
    remarks = _copy_rest(pair, target)
    return Restored({n.removesuffix(".weight"): zeros[n] for n in pair.linears}, tuple(remarks))


def _restored(pair: _Pair, name: str) -> tuple[Zeros, np.ndarray]:
    """Count the zeros of a matrix, and return the fine-tuned one with them put back."""
    value = pair.finetuned.read(name)
    # An adapter may also change the head, which is no part of what was pruned.
    mask = pair.pruned.read(name) == 0 if name in pair.linears else np.zeros(value.shape, bool)
    is_zero = value == 0
    counts = (mask.size, *map(np.count_nonzero, (mask, is_zero, mask & ~is_zero)))
    return Zeros(*map(int, counts)), np.where(mask, np.zeros((), value.dtype), value)


def _open(pruned: pathlib.Path, finetuned: pathlib.Path) -> _Pair:
    """Open both checkpoints, checking every name and shape before any weight is read."""
    config = _config(pruned)
    linears, model = linear_weights(config), _tensors(pruned, config)
    _check_blocks(pruned, model, config)
    shapes = {name: model.shapes.get(name, ()) for name in linears}
    _check_linears(pruned, model, shapes)
    if lora.is_adapter(finetuned):
        if weight_files(finetuned):
            raise InputError(
                f"{finetuned} holds a model and an adapter, which is merged or not",
                "keep them in directories of their own",
            )
        merged = lora.open_merged(model, finetuned, hf.specs(config)[0].config.tied)
        changed = frozenset(merged.factors).union(linears)
        stored = stored_names(model)
        return _Pair(linears, model, merged, changed, pruned, stored, (pruned, finetuned))
    hf.family(_config(finetuned))  # refuses quantised weights
    tensors = _tensors(finetuned, config)
    _check_blocks(finetuned, tensors, config)
    _check_linears(finetuned, tensors, shapes)
    changed, stored = frozenset(linears), stored_names(tensors)
    return _Pair(linears, model, tensors, changed, finetuned, stored, (finetuned,))


def _config(directory: pathlib.Path) -> dict[str, Any]:
    """Read the configuration of a checkpoint; InputError for a GGUF file."""
    if directory.is_file():
        raise InputError(
            f"{directory} is a GGUF file", "give the Hugging Face directory that it was made from"
        )
    return read_config(directory)


def _tensors(directory: pathlib.Path, config: Mapping[str, Any]) -> Tensors:
    """Open the tensors of a checkpoint under the names of a configuration's model."""
    names = [spec.name for spec in jax.tree.leaves(hf.specs(config)[1:], is_leaf=hf.is_spec)]
    return with_prefix(text_part(open_tensors(directory))[0], names)


def _check_blocks(directory: pathlib.Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the blocks of a configuration; InputError if not."""
    places = filter(None, map(_BLOCKS.match, linear_weights(config)))
    where = next((place[0] for place in places), "layers.")
    own = (name.removeprefix(where) for name in tensors.shapes if name.startswith(where))
    found, blocks = len({name.partition(".")[0] for name in own}), config["num_hidden_layers"]
    if found != blocks:
        raise InputError(
            f"{directory} holds {found} blocks, the pruned checkpoint's config.json names {blocks}",
            "they belong to different models",
        )


def _check_linears(
    directory: pathlib.Path, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that a checkpoint holds matrices of given shapes; InputError if not."""
    for name, shape in shapes.items():
        if name not in tensors.shapes:
            raise InputError(
                f"{directory} has no tensor {name}",
                "give a whole checkpoint of the pruned model, saved by save_pretrained",
            )
        if tensors.shapes[name] != shape:
            raise InputError(
                f"{directory}: {name} has shape {list(tensors.shapes[name])}, in the pruned "
                f"checkpoint {list(shape)}",
                "they belong to different models",
            )


def _check_files(directory: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
    """Check that tensors can be replaced in the weight files; InputError if not."""
    if files[0].name.startswith(PACKED):
        raise InputError(f"{directory} is packed", "write it dense first, with launch.unpack")
    seen: set[str] = set()
    for file in files:
        if file.suffix != ".safetensors":
            raise InputError(f"{file} is no safetensors file", "save the model in safetensors")
        for name, _ in _offsets(file):
            if name in seen:
                raise InputError(f"{file} repeats {name} of another shard", "save the model again")
            seen.add(name)


def _offsets(file: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yield the name and the first byte of each tensor of a safetensors file that was opened."""
    # The library writes whole files alone; the header says where a tensor lies.
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = parse_json(stream.read(length).decode())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, 8 + length + entry["data_offsets"][0]


def _copy_rest(pair: _Pair, target: pathlib.Path) -> list[str]:
    """Copy the configuration, the shards' index and the companions; return remarks."""
    for name in ("config.json", _INDEX):
        if (pair.source / name).is_file():
            shutil.copyfile(pair.source / name, target / name)
    config = read_config(pair.source)
    if str(config["model_type"]).startswith(OWN):
        (target / CODE).write_text(own_code(config), encoding="utf-8")
    remarks = []
    for directory in pair.companions:
        remarks += copy_companions(directory, target, config)
    return remarks
