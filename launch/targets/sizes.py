"""Count what a target bounds of a checkpoint on shapes: parameters, bytes of files, memory."""

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from launch.targets.shapes import Written
from launch.targets.syntax import Target
from models.checkpoint.fused import parts_of, stored_shapes
from models.checkpoint.tensors import METADATA
from models.checkpoint.writer import SHARD_BYTES
from models.families import hf

# Names of types in a safetensors header.
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Most entries that one stored value of MACKO covers, values that its kernels load at a time, and
# bytes of a row's index.
MACKO_GAP, MACKO_ALIGNED, MACKO_INDEX = 16, 8, 4
# Bytes of a further file's length, metadata and alignment.
FILE_OVERHEAD = 64


class Storage(NamedTuple):
    """Form in which weights are stored.

    Attributes:
      dtype: Name of the type.
      pack: "none", "bitmask" or "macko".
    """

    dtype: str
    pack: str

    @property
    def itemsize(self) -> int:
        """Return the bytes of a number."""
        return jnp.dtype(self.dtype).itemsize


def size_of(target: Target, written: Written, storage: Storage) -> int:
    """Return the quantity that a target of size bounds.

    Args:
      target: Target of any kind but latency.
      written: The checkpoint.
      storage: How its weights are stored; memory is that of the dense form.
    """
    if target.kind == "params":
        return parameters(written, storage)
    if target.kind == "weights":
        return weight_bytes(written, storage)
    return memory_bytes(written, storage, target.batch, target.length)


def parameters(written: Written, storage: Storage) -> int:
    """Return the parameters that are stored: a pack stores no zeros.

    Args:
      written: The checkpoint.
      storage: How its weights are stored.
    """
    if storage.pack == "none":
        return written.parameters
    sizes = {name: math.prod(shape) for name, shape in written.shapes.items()}
    return sum({**sizes, **written.entries}.values())


def memory_bytes(written: Written, storage: Storage, batch: int, length: int) -> int:
    """Return the bytes of the dense weights and of the keys and values of some texts.

    Args:
      written: The checkpoint.
      storage: Names the type of weights, keys and values.
      batch: Texts at a time.
      length: Tokens of each.
    """
    numbers = written.parameters + cache_entries(written, batch, length)
    return numbers * storage.itemsize


def cache_entries(written: Written, batch: int, length: int) -> int:
    """Return the keys and values of some texts, entries of all blocks.

    A block with a sliding window keeps the positions that the window reaches.

    Args:
      written: The checkpoint.
      batch: Texts at a time.
      length: Tokens of each.
    """
    config = hf.specs(written.config)[0].config
    windows = getattr(config, "windows", ()) or (None,) * len(written.blocks)
    total = 0
    for block, window in zip(written.blocks, windows, strict=True):
        positions = length if window is None else min(length, window)
        total += 2 * batch * positions * block.k.w.shape[0]
    return total


def weight_bytes(written: Written, storage: Storage) -> int:
    """Return the bytes of the weight files, their headers included.

    Args:
      written: The checkpoint.
      storage: How its weights are stored. The size of a "macko" pack is what zeros at random
        places would give, that of others is exact for one file and at most a little too much for
        several.
    """
    shapes = stored_shapes(written.shapes)
    tensors = {name: (CODES[storage.dtype], shape) for name, shape in shapes.items()}
    dense = sum(math.prod(shape) for shape in shapes.values()) * storage.itemsize
    files = 1 if dense <= SHARD_BYTES else len(written.blocks) + 1
    metadata: Mapping[str, str] = METADATA
    if storage.pack != "none":
        packed: dict[str, list[int]] = {}
        sizes = {name: math.prod(shape) for name, shape in written.linears.items()}
        entries = {**sizes, **written.entries}
        for name, own in parts_of(written.linears).items():
            shape = shapes[name]
            parts = _packed(shape, sum(entries[p] for p in own), storage)
            if parts:
                packed[name] = list(shape)
                del tensors[name]
                stem = name.removesuffix(".weight")
                tensors |= {stem + ending: part for ending, part in parts.items()}
        metadata = {"packing": storage.pack, "shapes": json.dumps(packed)}
    return _file_bytes(tensors, metadata) + (files - 1) * FILE_OVERHEAD


def _packed(
    shape: tuple[int, ...], entries: int, storage: Storage
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape of a packed matrix's parts; none where it is stored as it is."""
    rows, columns = shape
    code = CODES[storage.dtype]
    if storage.pack == "bitmask":
        bits = (rows, -(-columns // 8))
        if math.prod(bits) + entries * storage.itemsize >= rows * columns * storage.itemsize:
            return {}
        return {".bitmask": ("U8", bits), ".values": (code, (entries,))}
    zeros = 1 - entries / (rows * columns)
    # Gaps are geometric: the expected number of stored zeros that bridge 16 entries each.
    bridges = entries * zeros**MACKO_GAP / (1 - zeros**MACKO_GAP) if zeros < 1 else 0.0
    values = math.ceil((entries + bridges) / MACKO_ALIGNED) * MACKO_ALIGNED
    return {
        ".c_0": (code, (values,)),
        ".c_1": ("U8", (values // 2,)),
        ".c_2": ("I32", (rows + 1,)),
    }


def _file_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> int:
    """Return the bytes of one safetensors file: length, header, data."""
    itemsizes = dict.fromkeys(CODES.values(), 2) | {"F32": 4, "I32": 4, "U8": 1}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    # The library puts wider types first, and tensors of one type in the order of their names.
    for name, (code, shape) in sorted(tensors.items(), key=lambda t: (-itemsizes[t[1][0]], t[0])):
        start, end = end, end + math.prod(shape) * itemsizes[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end
