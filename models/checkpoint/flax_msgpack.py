"""Flax checkpoints (`flax_model.msgpack`), read tensor by tensor under PyTorch's names.

`flax.serialization` writes one nested msgpack map whose leaves are extension objects (shape, dtype
name, bytes). An array above 1 GiB is a map of chunks. Its `msgpack_restore` decodes a whole file
into memory. Here the map's headers are visited once, skipping the data, and `msgpack_restore`
decodes one leaf at a time.
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
from models.untrusted import is_count, shown

# Code of an extension object whose length takes 1, 2 or 4 bytes -> struct format of that length.
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_CHUNKED = "__msgpack_chunked_array__"
# Bytes given to the decoder at once: more than any map header, key, or the (shape, dtype) that
# opens an array.
_WINDOW = 1024
# Nesting beyond this is a damaged file; without a bound it would exhaust Python's stack.
_MAX_DEPTH = 32
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Flax names a parameter by its role; PyTorch calls every one `weight` except the bias.
_ROLES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "weight": "weight",
    "bias": "bias",
}


class _Leaf(NamedTuple):
    """Place of an array in the file.

    Attributes:
      start: Offset of its first byte.
      end: Offset after its last byte.
      shape: Shape of the array.
      dtype: Name of its type.
    """

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: str


def msgpack_entries(path: pathlib.Path) -> dict[str, Entry]:
    """List the arrays of a Flax msgpack file without reading their data.

    Args:
      path: The file.

    Returns:
      Entry of each array under its dotted Flax name, such as "model.norm.weight".

    Raises:
      InputError: The file is damaged, cut short, or not a map of arrays.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree, end = _node(data, 0, 0)
            if end != len(data):
                raise ValueError(f"it has {len(data)} bytes, its arrays end at byte {end}")
    except Exception as e:  # a damaged file raises any of a dozen types
        raise corrupt(path, e) from e
    leaves = flatten_dict(tree, sep=".") if isinstance(tree, dict) else {}
    wrong = next((name for name, leaf in leaves.items() if not isinstance(leaf, _Leaf)), None)
    if wrong is not None or not leaves:
        raise corrupt(path, f"{wrong or 'it'} is not an array")
    return {
        name: Entry(leaf.shape, partial(_load, path, name, leaf), dtype=leaf.dtype)
        for name, leaf in leaves.items()
    }


def _node(data: mmap.mmap, at: int, depth: int) -> tuple[Any, int]:
    """Read the msgpack object at byte `at`; return it and the offset after it.

    A map becomes a dict, an array a `_Leaf`, anything else its value.
    """
    code = data[at]
    if code in _EXTENSIONS:
        return _array(data, at)
    unpacker = msgpack.Unpacker(max_buffer_size=_WINDOW)
    unpacker.feed(data[at : at + _WINDOW])
    # 0x80 to 0x8F and 0xDE, 0xDF open a map; anything else here is a scalar or a string.
    if not (0x80 <= code <= 0x8F or code in (0xDE, 0xDF)):
        return unpacker.unpack(), at + unpacker.tell()
    if depth == _MAX_DEPTH:
        raise ValueError(f"maps nested deeper than {_MAX_DEPTH}")
    start, count, children = at, unpacker.read_map_header(), {}
    at += unpacker.tell()
    for _ in range(count):
        # At the greatest depth: a key that is itself a map is refused.
        key, at = _node(data, at, _MAX_DEPTH)
        children[str(key)], at = _node(data, at, depth + 1)
    if _CHUNKED in children:
        # An array above 1 GiB: the leaf spans the whole map, which msgpack_restore joins.
        sizes = children["shape"]
        shape = tuple(sizes[str(i)] for i in range(len(sizes)))
        if not all(is_count(size, 0) for size in shape):
            raise ValueError(f"an array of shape {shown(shape)} at byte {start}")
        dtype = next(iter(children["chunks"].values())).dtype
        return _Leaf(start, at, shape, dtype), at
    return children, at


def _array(data: mmap.mmap, at: int) -> tuple[_Leaf, int]:
    """Read the place of the array whose extension object starts at byte `at`.

    The object is its length, type 1, then shape, dtype and bytes as msgpack.
    """
    length = struct.Struct(_EXTENSIONS[data[at]])
    start = at + 1 + length.size
    end = start + 1 + length.unpack(data[at + 1 : start])[0]
    unpacker = msgpack.Unpacker(max_buffer_size=_WINDOW)
    unpacker.feed(data[start + 1 : start + 1 + _WINDOW])
    if data[start] != 1 or unpacker.read_array_header() != 3:
        raise ValueError(f"no array at byte {at}")
    shape, dtype = tuple(unpacker.unpack()), unpacker.unpack()
    if not all(is_count(size, 0) for size in shape):
        raise ValueError(f"an array of shape {shown(shape)} at byte {at}")
    return _Leaf(at, end, shape, dtype.decode() if isinstance(dtype, bytes) else str(dtype)), end


def _load(path: pathlib.Path, name: str, leaf: _Leaf) -> np.ndarray:
    try:
        with path.open("rb") as file:
            file.seek(leaf.start)
            array = msgpack_restore(file.read(leaf.end - leaf.start))
        # The opening of an array may say another shape than its data have.
        if array.shape != leaf.shape:
            raise ValueError(f"{name} has shape {list(array.shape)}, not {list(leaf.shape)}")
    except Exception as e:  # flax, msgpack and numpy each raise their own
        raise corrupt(path, e) from e
    # Integers would be cast without a word later.
    if array.dtype not in _FLOATS:
        raise not_floating(path, name, array.dtype)
    return array


def is_flax(names: Mapping[str, Any]) -> bool:
    """Return True if a checkpoint's names are Flax's.

    PyTorch names no parameter `kernel` or `embedding`.

    Args:
      names: Mapping by tensor name.
    """
    return any(name.endswith((".kernel", ".embedding")) for name in names)


def as_torch(entries: Mapping[str, Entry], where: pathlib.Path) -> dict[str, Entry]:
    """Rename Flax entries as PyTorch's, with kernels [in out] transposed to [out in].

    The names are those of transformers' FlaxLlama and FlaxOPT.

    Args:
      entries: Entry of each tensor by its Flax name.
      where: File or directory that errors name.

    Returns:
      Entry of each tensor by its PyTorch name.

    Raises:
      InputError: A parameter's role is not known.
    """
    renamed = {}
    for name, entry in entries.items():
        module, _, role = name.removeprefix("params.").rpartition(".")
        if role not in _ROLES:
            raise InputError(
                f"{where}: {name} is no parameter of a Flax LLaMA or OPT model",
                "convert the checkpoint to safetensors",
            )
        renamed[f"{module}.{_ROLES[role]}"] = _transposed(entry) if role == "kernel" else entry
    return renamed


def _transposed(entry: Entry) -> Entry:
    return Entry(entry.shape[::-1], lambda: entry.load().T, dtype=entry.dtype)
