"""Flax checkpoints (`flax_model.msgpack`) read tensor by tensor, and Flax's parameter names as PyTorch's.

`flax.serialization` writes one nested msgpack map whose leaves are extension objects (shape, dtype name, bytes); an array above
1 GiB is a map of chunks. Its `msgpack_restore` decodes a whole file into memory, so here the map's headers are walked once,
skipping the data, and `msgpack_restore` decodes one leaf at a time.
"""

import mmap
import pathlib
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from models.checkpoint.tensors import Entry, corrupt, not_floating
from models.errors import InputError

# Code of an extension object with a length of 1, 2 or 4 bytes, to the struct format of that length.
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_CHUNKED = "__msgpack_chunked_array__"
# Longer than any map header, key, or (shape, dtype) that opens an array.
_WINDOW = 1024
_DEEPEST = 32
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Flax modules name a parameter by its role; PyTorch names them all `weight` but for the bias.
_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "weight": "weight",
    "bias": "bias",
}


class _Leaf(NamedTuple):
    """An array's place in the file, bytes `start` to `end`, and its shape."""

    start: int
    end: int
    shape: tuple[int, ...]


def msgpack_entries(path: pathlib.Path) -> dict[str, Entry]:
    """The arrays of a Flax msgpack file under dotted Flax names ("model.norm.weight"), data not read.

    Raises InputError when the file is damaged, cut short, or not a map of arrays.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree, end = _node(data, 0, 0)
            if end != len(data):
                raise ValueError(f"it has {len(data)} bytes, its arrays end at byte {end}")
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        OSError,
        struct.error,
        msgpack.UnpackException,
    ) as e:
        raise corrupt(path, e) from e
    leaves = flatten_dict(tree, sep=".") if isinstance(tree, dict) else {}
    odd = next((name for name, leaf in leaves.items() if not isinstance(leaf, _Leaf)), None)
    if odd is not None or not leaves:
        raise corrupt(path, f"{odd or 'it'} is not an array")
    return {
        name: Entry(leaf.shape, partial(_load, path, name, leaf)) for name, leaf in leaves.items()
    }


def _node(data: mmap.mmap, at: int, depth: int) -> tuple[Any, int]:
    """The msgpack object at byte `at` (a dict, a `_Leaf` or a scalar) and the offset of what follows."""
    code = data[at]
    if code in _EXTENSIONS:
        return _array(data, at)
    unpacker = msgpack.Unpacker(max_buffer_size=_WINDOW)
    unpacker.feed(data[at : at + _WINDOW])
    if not (0x80 <= code <= 0x8F or code in (0xDE, 0xDF)):
        return unpacker.unpack(), at + unpacker.tell()
    if depth == _DEEPEST:
        raise ValueError(f"maps nested deeper than {_DEEPEST}")
    start, count, children = at, unpacker.read_map_header(), {}
    at += unpacker.tell()
    for _ in range(count):
        key, at = _node(data, at, _DEEPEST)
        children[str(key)], at = _node(data, at, depth + 1)
    if _CHUNKED in children:
        shape = children["shape"]
        return _Leaf(start, at, tuple(shape[str(i)] for i in range(len(shape)))), at
    return children, at


def _array(data: mmap.mmap, at: int) -> tuple[_Leaf, int]:
    """The array whose extension object starts at byte `at`: length, type 1, then shape, dtype and bytes as msgpack."""
    length = struct.Struct(_EXTENSIONS[data[at]])
    start = at + 1 + length.size
    end = start + 1 + length.unpack(data[at + 1 : start])[0]
    unpacker = msgpack.Unpacker(max_buffer_size=_WINDOW)
    unpacker.feed(data[start + 1 : start + 1 + _WINDOW])
    if data[start] != 1 or unpacker.read_array_header() != 3:
        raise ValueError(f"no array at byte {at}")
    return _Leaf(at, end, tuple(unpacker.unpack())), end


def _load(path: pathlib.Path, name: str, leaf: _Leaf) -> np.ndarray:
    try:
        with path.open("rb") as file:
            file.seek(leaf.start)
            array = msgpack_restore(file.read(leaf.end - leaf.start))
    except (ValueError, TypeError, OSError, msgpack.UnpackException) as e:
        raise corrupt(path, e) from e
    if array.dtype not in _FLOATS:
        raise not_floating(path, name, array.dtype)
    return array


def is_flax(names: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's names are Flax's: PyTorch has neither kernels nor embeddings by name."""
    return any(name.endswith((".kernel", ".embedding")) for name in names)


def as_torch(entries: Mapping[str, Entry], where: pathlib.Path) -> dict[str, Entry]:
    """Entries named as transformers' FlaxLlama and FlaxOPT did, renamed as PyTorch's: kernels [in, out] become [out, in].

    Raises InputError, naming `where`, for a parameter whose role is not known.
    """
    renamed = {}
    for name, entry in entries.items():
        module, _, role = name.removeprefix("params.").rpartition(".")
        if role not in _LEAVES:
            raise InputError(
                f"{where}: {name} is no parameter of a Flax LLaMA or OPT model: convert the checkpoint to safetensors"
            )
        renamed[f"{module}.{_LEAVES[role]}"] = _transposed(entry) if role == "kernel" else entry
    return renamed


def _transposed(entry: Entry) -> Entry:
    return Entry(entry.shape[::-1], lambda: entry.load().T)
