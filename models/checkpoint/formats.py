"""Checkpoint directories under Hugging Face names, in any format: safetensors, Flax's msgpack, PyTorch's pickle; sharded or not.

Opening reads headers only, and checks that the files are there, whole, and agree with their index. Data is read tensor by tensor.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

# Imported for its effect too: it teaches NumPy, and so safetensors, the name "bfloat16".
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from models.checkpoint.flax_msgpack import as_torch, is_flax, msgpack_entries
from models.checkpoint.tensors import WHOLE, Entry, LazyTensors, Tensors, corrupt, not_floating
from models.errors import InputError

if TYPE_CHECKING:
    import torch

_SAFETENSORS_FLOATS = ("F64", "F32", "F16", "BF16")


def open_tensors(directory: pathlib.Path) -> Tensors:
    """The weights of a checkpoint directory under Hugging Face names, in the first format found.

    The order is safetensors, Flax msgpack, PyTorch; of each, the single file before the sharded one.
    Raises InputError when there is none, when a file is damaged or missing, or when an index disagrees with its files.
    """
    for name, reader in _READERS.items():
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file() or index.is_file():
            entries = reader(single) if single.is_file() else _sharded(index, reader)
            return LazyTensors(
                as_torch(entries, directory) if is_flax(entries) else entries, directory
            )
    raise InputError(
        f"{directory} holds no weights: give a directory with {', '.join(_READERS)}, or with shards and their .index.json"
    )


def _sharded(
    index: pathlib.Path, reader: Callable[[pathlib.Path], dict[str, Entry]]
) -> dict[str, Entry]:
    """The entries of all shards of an index; InputError when a shard is missing or holds other tensors than the index says."""
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise InputError(
                f"{shard} is missing, but {index.name} names it: download the checkpoint again, all of it"
            )
        found = reader(shard)
        disagreed = found.keys() ^ {tensor for tensor, file in weight_map.items() if file == name}
        if disagreed:
            raise InputError(
                f"{index} and {name} disagree about {min(disagreed)}: download the checkpoint again, all of it"
            )
        entries |= found
    return entries


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor name to shard file of an index. Shards are plain file names: an index must not reach outside its directory."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = weight_map.items()
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise corrupt(
            index, e if isinstance(e, ValueError | OSError) else "it has no weight_map"
        ) from e
    for file in weight_map.values():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise InputError(
                f"{index} names the shard {file!r}, which is no file of its own directory: download the checkpoint again"
            )
    # Flax's indices separate the parts of a name with slashes.
    return {name.replace("/", "."): file for name, file in pairs}


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """A safetensors file whose header was checked against the file's length; InputError when it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise corrupt(path, e) from e


def _safetensors(path: pathlib.Path) -> dict[str, Entry]:
    with _opened(path) as file:
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    return {
        n: Entry(shape, load := partial(load_tensor, path, n), load) for n, shape in shapes.items()
    }


def load_tensor(path: pathlib.Path, name: str, rows: slice = WHOLE) -> np.ndarray:
    """One tensor of a safetensors file, or some of its rows; InputError when it is damaged, or holds no floating-point numbers."""
    # One opening a tensor: a file kept open keeps every page read in memory (543 MB against 137 MB after reading a 538 MB file).
    with _opened(path) as file:
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _SAFETENSORS_FLOATS:
            raise not_floating(path, name, dtype)
        return file.get_tensor(name) if rows == WHOLE else file.get_slice(name)[rows]


def _torch(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a `torch.save` file, memory-mapped. PyTorch's weights-only loader runs no code that the pickle asks for."""
    try:
        import torch
    except ImportError as e:
        raise InputError(
            f"{path} needs PyTorch: install the torch extra, or convert the checkpoint to safetensors"
        ) from e
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # a damaged pickle fails in any of a dozen ways
        raise corrupt(path, e, "download it again, or convert it to safetensors") from e
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(
            f"{path} is not a mapping of names to tensors: save the model's state_dict, or convert it to safetensors"
        )
    return {
        name: Entry(tuple(tensor.shape), partial(_load_torch, path, name, tensor))
        for name, tensor in state.items()
    }


def _load_torch(path: pathlib.Path, name: str, tensor: "torch.Tensor") -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:  # a type that PyTorch does not hand to NumPy
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        raise not_floating(path, name, tensor.dtype)
    return tensor.detach().numpy().copy()


_READERS: dict[str, Callable[[pathlib.Path], dict[str, Entry]]] = {
    "model.safetensors": _safetensors,
    "flax_model.msgpack": msgpack_entries,
    "pytorch_model.bin": _torch,
}
