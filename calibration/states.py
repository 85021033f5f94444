"""Hidden states between two blocks, kept where there is room: on the devices, in host memory, or in files."""

import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, overload

import jax
import numpy as np
from jax.sharding import Mesh

from models.programs import DeviceArray, planner
from models.sharding import split

Offload = Literal["device", "host", "disk"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)  # the fastest first


SHARE = {"device": 0.25, "host": 0.5}  # of a memory that hidden states may take


def available_memory() -> dict[str, int]:
    """Return the bytes of one device's memory and of the host's, by "device" and "host".

    A device that shares the host's memory, as a CPU does, counts as 0. Inside a planned run the
    figures are those of the machine that the plan is for.
    """
    recorder = planner()
    if recorder and recorder.memory:
        return dict(recorder.memory)
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"device": stats.get("bytes_limit", 0), "host": host}


def fits_in_memory(size: int, shards: int = 1) -> bool:
    """Whether a model of so many bytes, split over so many devices, may be held whole for a search, a check or a sample."""
    there = available_memory()
    return size / shards <= there["device"] / 2 if there["device"] else size <= there["host"] / 8


def choose_offload(device: int, host: int, there: Mapping[str, int]) -> Offload:
    """The fastest tier with room for hidden states that take so many bytes of each device, or of the host."""
    if not there["device"]:
        return "device" if host <= SHARE["host"] * there["host"] else "disk"
    if device <= SHARE["device"] * there["device"]:
        return "device"
    return "host" if host <= SHARE["host"] * there["host"] else "disk"


class OnDisk(NamedTuple):
    """An array in a file; NumPy's files do not know every type."""

    path: pathlib.Path
    dtype: np.dtype
    nbytes: int


Kept = jax.Array | np.ndarray | OnDisk | DeviceArray


def scratch(owner: object) -> pathlib.Path:
    """A temporary directory that goes when its owner does."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="topiary-"))
    weakref.finalize(owner, shutil.rmtree, directory, ignore_errors=True)
    return directory


def keep(x: jax.Array | np.ndarray, offload: Offload, path: pathlib.Path) -> Kept:
    """The array moved to a tier; `path` is the file where that is the disk."""
    if isinstance(x, DeviceArray):
        recorder = planner()
        return x if offload == "device" or not recorder else recorder.keep_off(x, offload)
    if offload == "device":
        return jax.numpy.asarray(x)
    value = np.asarray(x)
    if offload == "host":
        return value
    np.save(path, value)
    return OnDisk(path, value.dtype, value.nbytes)


def fetch(kept: Kept) -> Any:
    """What was kept, on the device or in host memory."""
    return np.load(kept.path).view(kept.dtype) if isinstance(kept, OnDisk) else kept


class States(Sequence[jax.Array]):
    """The hidden states of all micro-batches [b t d], in a tier; what is asked for is on the devices.

    Args:
      xs: in order; each is moved as it comes.
      mesh: windows are split over its `data` axis.
    """

    def __init__(
        self,
        xs: Iterable[jax.Array | np.ndarray],
        offload: Offload = "device",
        mesh: Mesh | None = None,
    ):
        self._tier, self._mesh = offload, mesh
        self._directory = scratch(self) if offload == "disk" else pathlib.Path()
        self._kept: list[Kept] = []
        for x in xs:
            self.append(x)

    def append(self, x: jax.Array | np.ndarray) -> None:
        """Those of one more micro-batch."""
        self._kept.append(self._moved(len(self._kept), x))

    def _moved(self, j: int, x: jax.Array | np.ndarray) -> Kept:
        placed = split(x, self._mesh, "sample") if self._tier == "device" else x
        return keep(placed, self._tier, self._directory / f"{j}.npy")

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, j: int) -> jax.Array: ...
    @overload
    def __getitem__(self, j: slice) -> list[jax.Array]: ...
    def __getitem__(self, j: int | slice) -> jax.Array | list[jax.Array]:
        if isinstance(j, slice):
            return [self[k] for k in range(*j.indices(len(self)))]
        return split(fetch(self._kept[j]), self._mesh, "sample")

    def __setitem__(self, j: int, x: jax.Array) -> None:
        self._kept[j] = self._moved(j, x)

    def copy(self) -> "States":
        """The same states once more, to be changed on their own."""
        return States((fetch(x) for x in self._kept), self._tier, self._mesh)

    def stored(self) -> list[Any]:
        """All of them where they are, files mapped into memory: for saving."""
        return [
            np.load(x.path, mmap_mode="r").view(x.dtype) if isinstance(x, OnDisk) else x
            for x in self._kept
        ]
