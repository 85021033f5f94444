"""Common view of a checkpoint's weights: named tensors with known shapes, data not read yet."""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from safetensors.numpy import save_file

from models.errors import InputError

# transformers refuses safetensors files without it.
METADATA = {"format": "pt"}
# All rows of a tensor.
WHOLE = slice(None)
LFS_POINTER = b"version https://git-lfs"  # how every pointer file begins


class Tensors(Protocol):
    """Named tensors of a checkpoint, read one at a time.

    Attributes:
      shapes: Shape of each tensor by its Hugging Face (PyTorch) name, linears [out in], known
        without reading data.
      dtypes: Name of the type that each tensor is read in, such as "float16".
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """Read a tensor, or some of its rows, and keep nothing of it.

        Args:
          name: Hugging Face name.
          rows: Rows to read.

        Returns:
          Tensor in its stored dtype: float64, float32, float16 or ml_dtypes.bfloat16.

        Raises:
          InputError: There is no such tensor, its dtype is not floating, or its file is damaged.
        """
        ...


class Entry(NamedTuple):
    """A tensor that is still in its file.

    Attributes:
      shape: Shape of the tensor.
      load: Function that reads it.
      part: Function that reads some of its rows; None where the format cannot.
      dtype: Name of the type that it is read in.
    """

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    part: Callable[[slice], np.ndarray] | None = None
    dtype: str = "float32"


class LazyTensors:
    """`Tensors` over entries.

    Args:
      entries: Entry of each tensor by name.
      where: File or directory that errors name.
    """

    def __init__(self, entries: Mapping[str, Entry], where: pathlib.Path):
        self._entries = dict(entries)
        self._where = where
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: entry.shape for name, entry in self._entries.items()
        }
        self.dtypes: Mapping[str, str] = {
            name: entry.dtype for name, entry in self._entries.items()
        }

    def read(self, name: str, rows: slice = WHOLE) -> np.ndarray:
        """Read a tensor or some of its rows, see `Tensors.read`.

        Args:
          name: Hugging Face name.
          rows: Rows to read.

        Returns:
          Tensor in its stored dtype.

        Raises:
          InputError: There is no such tensor, its dtype is not floating, or its file is damaged.
        """
        if name not in self._entries:
            raise InputError(
                f"{self._where} has no tensor {name}",
                "check that its config.json belongs to these weights",
            )
        entry = self._entries[name]
        if rows == WHOLE:
            return entry.load()
        # Formats that cannot read a part read the whole and drop the rest.
        return entry.part(rows) if entry.part else entry.load()[rows]


def corrupt(
    path: pathlib.Path, reason: Exception | str, remedy: str = "download it again"
) -> InputError:
    """Return the error for a weights file that cannot be read.

    Args:
      path: The file.
      reason: Cause, of which the first line is shown.
      remedy: What the user can do about it.

    Returns:
      Error, which names a missing file, missing permissions and git-lfs pointers as such.
    """
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as e:
        return InputError(
            f"{path} cannot be read ({e.strerror or e})",
            "check that the file exists and its permissions",
        )
    # A clone without git-lfs has small text files in place of the weights.
    if is_pointer:
        return InputError(
            f"{path} is a git-lfs pointer, not the weights", "run git lfs pull in its directory"
        )
    # Libraries' messages run over many lines, and some exceptions have none.
    first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return InputError(f"{path} is damaged or not complete ({first})", remedy)


def not_floating(path: pathlib.Path, name: str, dtype: object) -> InputError:
    """Return the error for a tensor of integers or of a quantised type.

    Args:
      path: The file.
      name: Name of the tensor.
      dtype: Stored type.
    """
    return InputError(
        f"{path}: tensor {name} is stored as {dtype}, not as a float of 16 bits or more",
        "dequantise the checkpoint first",
    )


def save_tensors(
    tensors: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str] = METADATA
) -> None:
    """Write a safetensors file that others may read as far as the umask allows.

    Args:
      tensors: Contiguous arrays by name.
      path: The file, replaced if it is there.
      metadata: Facts for the file's header.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    # The library renames a temporary file, which only its owner may read, to this name.
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(mode)
