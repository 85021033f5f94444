"""GGUF files as Hugging Face checkpoints.

llama.cpp stores the same parameters under other names, with differences that the table in
`models.checkpoint.gguf_names` has for each architecture: rows of queries and keys ordered for
interleaved rotary pairs, norms that hold Gemma's scale plus one, linears fused to one tensor.
Tied embeddings have no output matrix.
"""

import pathlib
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from models.checkpoint.gguf_blocks import fill_absent, read_counts
from models.checkpoint.gguf_config import read_config
from models.checkpoint.gguf_fields import REMEDY, Settings, typed
from models.checkpoint.gguf_file import GgufFile, lazy, read_gguf
from models.checkpoint.gguf_names import (
    ARCHITECTURES,
    LONG_FACTORS,
    NON_BLOCK,
    RAGGED,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
)
from models.checkpoint.gguf_vocab import build_tokenizer, tokenizer_config
from models.checkpoint.tensors import Entry, LazyTensors, Tensors
from models.errors import InputError
from models.untrusted import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class _Place(NamedTuple):
    """A tensor of the file in the checkpoint: the slots that it holds, and the names of each."""

    slots: tuple[str, ...]
    names: tuple[str, ...]


def open_gguf(path: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """Open a GGUF file as a configuration and tensors of one of transformers' models.

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
    arch = ARCHITECTURES[kind]
    places = {name: _place(file, kind, name) for name in file.tensors}
    settings = Settings(file, kind)
    counts = None
    if kind == RAGGED:
        counts = read_counts(file, kind, settings.count("block_count"))
    names = [name for place in places.values() for name in place.names]
    config = read_config(settings, arch, counts, names)
    entries: dict[str, Entry] = {}
    for name, place in places.items():
        # Nothing is read or dequantised before a block is asked for.
        entry = lazy(path, name, file.tensors[name])
        entries |= _converted(entry, place, arch, config, f"{path}: {name}")
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


def _place(file: GgufFile, kind: str, name: str) -> _Place:
    """Return the place of a tensor in the checkpoint; InputError if it has none."""
    # Rotary factors become part of the configuration.
    if name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
        return _Place((), ())
    arch = ARCHITECTURES[kind]
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    block, part, suffix = match.groups() if match else (None, "", "")
    known = arch.parts() if block else {part: (slot,) for slot, part in NON_BLOCK.items()}
    if part not in known:
        raise InputError(f"{file.path}: tensor {name} is not part of a plain {kind} model", REMEDY)
    prefix = "" if block is None else f"model.layers.{block}."
    # Parts that the checkpoint fuses too are one tensor in both.
    modules = dict.fromkeys(arch.module(slot) for slot in known[part])
    return _Place(known[part], tuple(f"{prefix}{m}.{suffix}" for m in modules))


def _converted(
    entry: Entry, place: _Place, arch: Architecture, config: Mapping[str, Any], where: str
) -> dict[str, Entry]:
    """Return a tensor of the file as the checkpoint has it, in parts if it has several."""
    if arch.permuted and place.slots in (("q",), ("k",)):
        entry = _unpermuted(entry, config["head_dim"], where)
    if arch.norm_offset and place.slots and place.slots[0].endswith("norm"):
        entry = _shifted(entry, arch.norm_offset)
    if len(place.names) <= 1:
        return dict.fromkeys(place.names, entry)
    return _split(entry, place, config, where)


def _shifted(entry: Entry, offset: float) -> Entry:
    """Subtract a number from a norm, in the float32 that files store norms in."""
    return Entry(
        entry.shape,
        lambda: np.asarray(entry.load(), np.float32) - np.float32(offset),
    )


def _split(entry: Entry, place: _Place, config: Mapping[str, Any], where: str) -> dict[str, Entry]:
    """Split queries, keys and values that lie below each other."""
    head_dim = config["head_dim"]
    heads = (config["num_attention_heads"], *[config["num_key_value_heads"]] * 2)
    if entry.shape[0] != sum(heads) * head_dim:
        raise InputError(
            f"{where} has {entry.shape[0]} rows, not {sum(heads)} heads of {head_dim}", REMEDY
        )
    parts, first = {}, 0
    for name, count in zip(place.names, heads, strict=True):
        rows = slice(first, first + count * head_dim)
        first = rows.stop
        parts[name] = Entry(
            (count * head_dim, *entry.shape[1:]), partial(_rows, entry, rows), dtype=entry.dtype
        )
    return parts


def _rows(entry: Entry, rows: slice) -> np.ndarray:
    return entry.load()[rows]


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


def _architecture(file: GgufFile) -> str:
    """Return the architecture of a whole model; InputError if it is not read."""
    kind = typed(file, "general.architecture", str)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {shown(kind)} is not read from GGUF, only "
            f"{', '.join(ARCHITECTURES)}",
            REMEDY,
        )
    if "token_embd.weight" not in file.tensors:
        raise InputError(
            f"{file.path} holds no token_embd.weight, so it is not a whole model",
            "download it again",
        )
    return kind
