"""The view of a checkpoint's weights that every reader gives: named tensors whose shapes are known and whose data is not read."""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from models.errors import InputError

WHOLE = slice(None)
LFS_POINTER = b"version https://git-lfs"


class Tensors(Protocol):
    """Named tensors of a checkpoint, read one at a time.

    `shapes` maps Hugging Face's (PyTorch) names to shapes, linears [out, in], and is known without reading data.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """The tensor, or some of its rows, in its stored dtype (float64, float32, float16 or ml_dtypes.bfloat16); nothing keeps it after
        the call.

        Raises InputError when there is no such tensor, when it is not of a floating dtype, or when its file is damaged.
        """
        ...


class Entry(NamedTuple):
    """A tensor that is still in its file: its shape, how to read it, and how to read some of its rows where the format can."""

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    part: Callable[[slice], np.ndarray] | None = None


class LazyTensors:
    """`Tensors` over entries by name; `where` is the file or directory that errors name."""

    def __init__(self, entries: Mapping[str, Entry], where: pathlib.Path):
        self._entries, self._where = dict(entries), where
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: entry.shape for name, entry in self._entries.items()
        }

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """See `Tensors.read`."""
        if name not in self._entries:
            raise InputError(
                f"{self._where} has no tensor {name}: check that its config.json belongs to these weights"
            )
        entry = self._entries[name]
        if rows == WHOLE:
            return entry.load()
        return entry.part(rows) if entry.part else entry.load()[rows]


def corrupt(
    path: pathlib.Path, reason: Exception | str, mend: str = "download it again"
) -> InputError:
    """The error for a weights file that cannot be read: the first line of `reason`, and what to do about it."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as e:
        return InputError(
            f"{path} cannot be read ({e.strerror or e}): check that the file exists and its permissions"
        )
    if pointer:
        return InputError(
            f"{path} is a git-lfs pointer, not the weights: run git lfs pull in its directory"
        )
    first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return InputError(f"{path} is damaged or not complete ({first}): {mend}")


def not_floating(path: pathlib.Path, name: str, dtype: object) -> InputError:
    """The error for a tensor of integers or of a quantised type."""
    return InputError(
        f"{path}: tensor {name} is stored as {dtype}, not as a float of 16 bits or more: dequantise the checkpoint first"
    )
