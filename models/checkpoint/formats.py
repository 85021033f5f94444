"""Checkpoint directories under Hugging Face names: safetensors, Flax msgpack, PyTorch, packed.

Each format may be sharded. Opening reads headers only and checks that the files exist and are
whole. Data is read tensor by tensor.
"""

import contextlib
import os
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
from models.untrusted import UserFile, parse_json, shown, shown_text

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
      InputError: There are no weights, or a file is damaged or missing.
    """
    name = _format_of(directory)
    if name is None:
        raise InputError(
            f"{directory} holds no weights",
            f"give a directory with {', '.join(_READERS)}, or with shards and their .index.json",
        )
    single, reader = directory / name, _READERS[name]
    entries = reader(single) if single.is_file() else _sharded(_index_of(single), reader)
    return LazyTensors(as_torch(entries, directory) if is_flax(entries) else entries, directory)


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """List the files that hold a checkpoint's weights.

    Args:
      path: Checkpoint directory or `.gguf` file.

    Returns:
      Files that `open_tensors` reads; empty if there are none.

    Raises:
      InputError: An index is damaged.
    """
    if path.is_file():
        return [path]
    name = _format_of(path)
    if name is None:
        return []
    if (path / name).is_file():
        return [path / name]
    return [path / shard for shard in sorted(set(read_weight_map(_index_of(path / name)).values()))]


def _index_of(single: pathlib.Path) -> pathlib.Path:
    return single.with_name(f"{single.name}.index.json")


def _format_of(directory: pathlib.Path) -> str | None:
    """Return the single file's name of the first format that a directory has."""
    for name in _READERS:
        if (directory / name).is_file() or _index_of(directory / name).is_file():
            return name
    return None


def _sharded(
    index: pathlib.Path, reader: Callable[[pathlib.Path], dict[str, Entry]]
) -> dict[str, Entry]:
    """Return the entries of all shards that an index names.

    As in transformers, the shards say what there is. Indices of real checkpoints name buffers and
    tied heads that no shard has, and leave out others; `models.checkpoint.reader.check` finds what
    matters. Of a tensor in two shards the index says which one counts.
    """
    weight_map = read_weight_map(index)
    entries: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        # Not Path.is_file, which raises for a name that is too long.
        if not os.path.isfile(shard):
            raise InputError(
                f"{shard.parent / shown_text(shard.name)} is missing, but {index.name} names it",
                "download the checkpoint again, all of it",
            )
        for tensor, entry in reader(shard).items():
            if tensor not in entries or weight_map.get(tensor) == name:
                entries[tensor] = entry
    return entries


def read_weight_map(index: pathlib.Path) -> dict[str, str]:
    """Read an index of shards.

    Args:
      index: The index.

    Returns:
      The shard file of each tensor, relative to the index's directory.

    Raises:
      InputError: The index is damaged, or names a file outside its directory.
    """
    try:
        weight_map = parse_json(UserFile(index).read_text())["weight_map"]
        pairs = weight_map.items()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise corrupt(index, e if isinstance(e, ValueError) else "it has no weight_map") from e
    for file in weight_map.values():
        # An index from elsewhere must not make us read files outside its directory.
        parts = file.split("/") if isinstance(file, str) else [""]
        if set(parts) & {"", ".", ".."} or set(file) & set("\\\0"):
            raise InputError(
                f"{index} names the shard {shown(file)}, which is no file of its own directory",
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


def safetensors_entries(path: pathlib.Path) -> dict[str, Entry]:
    """Open a safetensors file.

    Args:
      path: The file.

    Returns:
      Entries of its tensors by name.

    Raises:
      InputError: The file is damaged.
    """
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
    for name, tensor in state.items():
        # Only plain tensors can be seen as NumPy arrays.
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else tensor.dtype if tensor.is_quantized else "sparse"
            raise not_floating(path, name, kind)
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

    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise not_floating(path, name, tensor.dtype)
    plain = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        # PyTorch does not convert this type to NumPy, so its bits go over as int16.
        return plain.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return plain.numpy().copy()


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
        for name, (rows, columns) in parse_json(header["shapes"]).items():
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
    "model.safetensors": safetensors_entries,
    "flax_model.msgpack": msgpack_entries,
    "pytorch_model.bin": _torch,
    "packed.safetensors": packed_entries,
}
