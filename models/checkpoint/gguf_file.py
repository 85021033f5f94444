"""GGUF container: metadata and tensors of a `.gguf` file, dequantised one tensor at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Block sizes and dequantisation are the `gguf` package's. The header is parsed here, because the
package's `GGUFReader` makes a NumPy view per token (3 s and 170 MB for a vocabulary of 49 thousand,
against 0.1 s) and never ends on an array whose stated length exceeds the file.
"""

import math
import mmap
import pathlib
import struct
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from models.checkpoint.tensors import Entry, corrupt, not_floating
from models.errors import InputError
from models.untrusted import is_count, shown, shown_text

# The format's codes of scalar types, as NumPy types.
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
# Tensor types that are stored as they are used; every other one is dequantised to float32.
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Stored(NamedTuple):
    """Place of a tensor in the file.

    Attributes:
      shape: Shape, outermost axis first.
      dtype: Name of its GGML type, such as "Q4_K".
      offset: Offset of its first byte in the file.
      size: Number of bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


class GgufFile(NamedTuple):
    """Parsed header of a GGUF file.

    Attributes:
      path: The file.
      metadata: Value of each key.
      tensors: Place of each tensor by name.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


class _Cursor:
    """Reader of the header's values in order; raises ValueError at the end of the file."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        """Read bytes.

        Args:
          size: Number of bytes.

        Returns:
          Bytes from the current position.

        Raises:
          ValueError: The file ends before.
        """
        # A damaged length must not reach an allocation.
        if size > len(self._data) - self.at:
            raise ValueError(f"{size} bytes expected at byte {self.at} of {len(self._data)}")
        self.at += size
        return self._data[self.at - size : self.at]

    def integer(self, layout: str) -> int:
        """Read an integer.

        Args:
          layout: Format of `struct`.

        Returns:
          Integer.
        """
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        """Read a string with its length before it."""
        return self.take(self.integer("<Q")).decode("utf-8")

    def scalars(self, kind: int, count: int) -> list[Any]:
        """Read values of one scalar type.

        Args:
          kind: The format's code of the type.
          count: Number of values.

        Returns:
          List of values.

        Raises:
          ValueError: The type is not known.
        """
        if kind not in _SCALARS:
            raise ValueError(f"unknown type {kind} of a value before byte {self.at}")
        dtype = np.dtype(_SCALARS[kind])
        # One conversion for the whole list: vocabularies have a hundred thousand entries.
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def value(self) -> Any:
        """Read a metadata value: a scalar, a string, or a list of either."""
        kind = self.integer("<I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalars(kind, 1)[0]
        kind, count = self.integer("<I"), self.integer("<Q")
        return [self.text() for _ in range(count)] if kind == _STRING else self.scalars(kind, count)


def read_gguf(path: pathlib.Path) -> GgufFile:
    """Parse the header of a GGUF file without reading tensor data.

    Args:
      path: The file.

    Returns:
      Metadata and tensors.

    Raises:
      InputError: The file is damaged, cut short, of another version or byte order, or one of
        several shards, or the `gguf` package is missing.
    """
    try:
        import gguf  # noqa: F401  (fail now rather than at the first tensor)
    except ImportError as e:
        raise InputError(f"{path} needs the gguf package", "pip install gguf") from e
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _parse(_Cursor(data), len(data))
    except (ValueError, KeyError, OverflowError, OSError) as e:
        raise corrupt(path, e) from e
    # A shard alone lacks tensors.
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{path} is one of {shown(metadata['split.count'])} shards",
            "join them first, with the merge option of llama-gguf-split",
        )
    return GgufFile(path, metadata, tensors)


def _parse(cursor: _Cursor, length: int) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Parse the metadata and the places of the tensors in a file of `length` bytes."""
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    version = cursor.integer("<I")
    if version not in _VERSIONS:
        raise ValueError(
            f"GGUF version {version}, or another byte order; versions 2 and 3 are known, "
            "little-endian"
        )
    tensor_count, field_count = cursor.integer("<Q"), cursor.integer("<Q")
    metadata = {cursor.text(): cursor.value() for _ in range(field_count)}
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {shown(alignment)}")
    # Tensor data begins at the next multiple of the alignment; offsets count from there.
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: stored._replace(offset=start + stored.offset) for name, stored in infos}
    # A download that was cut short ends within the tensors.
    for name, stored in tensors.items():
        if stored.offset + stored.size > length:
            raise ValueError(
                f"tensor {shown_text(name)} ends at byte {stored.offset + stored.size} of {length}"
            )
    return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, Stored]:
    """Read a tensor's name and place, its offset relative to the start of the data."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text()
    # GGUF lists the innermost axis first.
    shape = tuple(cursor.integer("<Q") for _ in range(cursor.integer("<I")))[::-1]
    kind = GGMLQuantizationType(cursor.integer("<I"))
    # A quantised type stores whole blocks of values along the innermost axis.
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or not all(map(is_count, shape)) or shape[-1] % block:
        raise ValueError(
            f"tensor {shown_text(name)} of shape {shown(list(shape))} is not one of whole blocks "
            f"of {block}"
        )
    return name, Stored(
        shape, kind.name, cursor.integer("<Q"), math.prod(shape) // block * block_bytes
    )


def lazy(path: pathlib.Path, name: str, stored: Stored) -> Entry:
    """Return a tensor as an entry that reads it on demand.

    Args:
      path: The file.
      name: Name of the tensor.
      stored: Place of the tensor.

    Returns:
      Entry of its own dtype if that is a float of 16 bits or more, else float32.
    """
    dtype = np.dtype(_PLAIN.get(stored.dtype, np.float32)).name
    return Entry(stored.shape, partial(_load, path, name, stored), dtype=dtype)


def _load(path: pathlib.Path, name: str, stored: Stored) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        # Read rather than mapped: mapped pages would stay in memory.
        raw = np.fromfile(path, np.uint8, stored.size, offset=stored.offset)
    except OSError as e:
        raise corrupt(path, e) from e
    if raw.size != stored.size:
        raise corrupt(path, f"tensor {name} is cut short")
    if stored.dtype in _PLAIN:
        return raw.view(_PLAIN[stored.dtype]).reshape(stored.shape)
    try:
        return dequantize(raw.reshape(*stored.shape[:-1], -1), GGMLQuantizationType[stored.dtype])
    except (NotImplementedError, KeyError) as e:
        raise not_floating(path, name, stored.dtype) from e
