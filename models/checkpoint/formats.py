"""Checkpoint directories under Hugging Face names: safetensors, Flax msgpack, PyTorch, packed.

Each format may be sharded. Opening reads headers only and checks that the files exist, are whole
and agree with their index. Data is read tensor by tensor.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

# Importing it also registers the name "bfloat16" with NumPy, which safetensors looks up.
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from models.checkpoint.flax_msgpack import as_torch, is_flax, msgpack_entries
from models.checkpoint.pack_formats import PACKINGS
from models.checkpoint.tensors import WHOLE, Entry, LazyTensors, Tensors, corrupt, not_floating
from models.errors import InputError

if TYPE_CHECKING:
    import torch

_SAFETENSORS_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS = tuple(_SAFETENSORS_FLOATS.values())


def open_tensors(directory: pathlib.Path) -> Tensors:
    """Open the weights of a checkpoint directory in the first format that it has.

    The order is safetensors, Flax msgpack, PyTorch, packed safetensors, each as a single file
    before shards.

    Args:
      directory: Checkpoint directory.

    Returns:
      Tensors under Hugging Face names.

    Raises:
      InputError: There are no weights, a file is damaged or missing, or an index disagrees with its
        files.
    """
    for name, reader in _READERS.items():
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file() or index.is_file():
            entries = reader(single) if single.is_file() else _sharded(index, reader)
            return LazyTensors(
                as_torch(entries, directory) if is_flax(entries) else entries, directory
            )
    raise InputError(
        f"{directory} holds no weights",
        f"give a directory with {', '.join(_READERS)}, or with shards and their .index.json",
    )


def _sharded(
    index: pathlib.Path, reader: Callable[[pathlib.Path], dict[str, Entry]]
) -> dict[str, Entry]:
    """Return the entries of all shards of an index, checked against it."""
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise InputError(
                f"{shard} is missing, but {index.name} names it",
                "download the checkpoint again, all of it",
            )
        shard_entries = reader(shard)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        disagreed = shard_entries.keys() ^ listed
        if disagreed:
            raise InputError(
                f"{index} and {name} disagree about {min(disagreed)}",
                "download the checkpoint again, all of it",
            )
        entries |= shard_entries
    return entries


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Read an index; return the shard file of each tensor."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = weight_map.items()
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = e if isinstance(e, ValueError | OSError) else "it has no weight_map"
        raise corrupt(index, reason) from e
    for file in weight_map.values():
        # An index from elsewhere must not make us read files outside its directory.
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise InputError(
                f"{index} names the shard {file!r}, which is no file of its own directory",
                "download the checkpoint again",
            )
    # Flax's indices separate the parts of a name with slashes.
    return {name.replace("/", "."): file for name, file in pairs}


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """Open a safetensors file, its header checked against its length; InputError if damaged."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as e:  # also raised by reads inside the `with`
        raise corrupt(path, e) from e


def _safetensors(path: pathlib.Path) -> dict[str, Entry]:
    with _opened(path) as file:
        slices = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118
        kinds = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    entries = {}
    for name, (shape, dtype) in kinds.items():
        load = partial(load_tensor, path, name)
        # Other types are refused when they are read: nothing may need them.
        entries[name] = Entry(shape, load, load, _SAFETENSORS_FLOATS.get(dtype, dtype))
    return entries


def load_tensor(path: pathlib.Path, name: str, rows: slice = WHOLE) -> np.ndarray:
    """Read a tensor of a safetensors file, or some of its rows.

    Args:
      path: The file.
      name: Name of the tensor.
      rows: Rows to read.

    Returns:
      Tensor in its stored dtype.

    Raises:
      InputError: The file is damaged or the tensor holds no floating-point numbers.
    """
    # The file is opened for each tensor. One that stays open keeps every page read in memory:
    # 543 MB against 137 MB after a 538 MB file.
    with _opened(path) as file:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _SAFETENSORS_FLOATS:
            raise not_floating(path, name, dtype)
        return file.get_tensor(name) if rows == WHOLE else file.get_slice(name)[rows]


def _torch(path: pathlib.Path) -> dict[str, Entry]:
    """Return the tensors of a `torch.save` file, memory-mapped.

    PyTorch's weights-only loader runs no code that the pickle asks for.
    """
    try:
        import torch
    except ImportError as e:
        raise InputError(
            f"{path} needs PyTorch", "pip install torch, or convert the checkpoint to safetensors"
        ) from e
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # a damaged pickle raises any of a dozen types
        raise corrupt(path, e, "download it again, or convert it to safetensors") from e
    # A pickle may hold a whole module or a trainer's state instead.
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(
            f"{path} is not a mapping of names to tensors",
            "save the model's state_dict, or convert it to safetensors",
        )
    return {
        name: Entry(
            tuple(tensor.shape),
            partial(_load_torch, path, name, tensor),
            dtype=str(tensor.dtype).removeprefix("torch."),
        )
        for name, tensor in state.items()
    }


def _load_torch(path: pathlib.Path, name: str, tensor: "torch.Tensor") -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        # PyTorch does not convert this type to NumPy, so its bits go over as int16.
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        raise not_floating(path, name, tensor.dtype)
    return tensor.detach().numpy().copy()


def packed_entries(path: pathlib.Path) -> dict[str, Entry]:
    """Open a safetensors file whose matrices are stored without their zeros.

    Args:
      path: A file that `models.checkpoint.pack` wrote.

    Returns:
      Entries of the dense tensors by name; matrices are unpacked when they are read.

    Raises:
      InputError: The file is damaged, or not such a file.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
        stored = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    entries = {}
    try:
        packing = PACKINGS[header["packing"]]
        for name, (rows, columns) in json.loads(header["shapes"]).items():
            shape = int(rows), int(columns)
            parts = [name.removesuffix(".weight") + part for part in packing.parts]
            for part in parts:
                del stored[part]
            entries[name] = Entry(shape, partial(_load_packed, path, name, header, shape))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise corrupt(path, "its header does not describe a pack", "pack the model again") from e
    for name, whole in stored.items():
        entries[name] = Entry(whole, partial(load_tensor, path, name))
    return entries


def _load_packed(
    path: pathlib.Path, name: str, header: Mapping[str, str], shape: tuple[int, int]
) -> np.ndarray:
    packing = PACKINGS[header["packing"]]
    with _opened(path) as file:
        stored = [file.get_tensor(name.removesuffix(".weight") + p) for p in packing.parts]
    try:
        matrix = packing.unpack(tuple(stored), *shape)
    except ValueError as e:
        raise corrupt(path, f"{name}: {e}", "pack the model again") from e
    if matrix.dtype.name not in _FLOATS:
        raise not_floating(path, name, matrix.dtype)
    return matrix


_READERS: dict[str, Callable[[pathlib.Path], dict[str, Entry]]] = {
    "model.safetensors": _safetensors,
    "flax_model.msgpack": msgpack_entries,
    "pytorch_model.bin": _torch,
    "packed.safetensors": packed_entries,
}
