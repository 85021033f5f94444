"""Hidden states between two blocks, kept on the devices, in host memory, or in files."""

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
from models.sharding import STATES, split

Offload = Literal["device", "host", "disk"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)  # the fastest first

# Share of a memory that hidden states may take; weights and statistics need the rest.
SHARE = {"device": 0.25, "host": 0.5}


def available_memory() -> dict[str, int]:
    """Return the bytes of one device's memory and of the host's, by "device" and "host".

    A device that shares the host's memory, as a CPU does, counts as 0. Inside a planned run the
    figures are those of the machine that the plan is for.
    """
    recorder = planner()
    if recorder and recorder.memory:
        return dict(recorder.memory)
    # CPUs report no memory of their own.
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"device": stats.get("bytes_limit", 0), "host": host}


def fits_in_memory(size: int, shards: int = 1) -> bool:
    """Return whether a whole model may be held in memory for a search, a check or a sample.

    Args:
      size: Bytes of the model.
      shards: Devices that it is split over.
    """
    available = available_memory()
    if available["device"]:
        # The other half is for hidden states and the programs' own memory.
        return size / shards <= available["device"] / 2
    return size <= available["host"] / 8  # the process and its copies need the rest


def choose_offload(device: int, host: int, available: Mapping[str, int]) -> Offload:
    """Return the fastest memory with room for the hidden states.

    Args:
      device: Bytes that they take of each device.
      host: Bytes that they take of the host.
      available: Bytes of a device and of the host, as `available_memory` gives them.
    """
    if not available["device"]:
        return "device" if host <= SHARE["host"] * available["host"] else "disk"
    if device <= SHARE["device"] * available["device"]:
        return "device"
    return "host" if host <= SHARE["host"] * available["host"] else "disk"


class OnDisk(NamedTuple):
    """An array in a file.

    Attributes:
      path: The file.
      dtype: Type of the array; NumPy's files do not know every type.
      nbytes: Size in bytes.
    """

    path: pathlib.Path
    dtype: np.dtype
    nbytes: int


Kept = jax.Array | np.ndarray | OnDisk | DeviceArray


def scratch(owner: object) -> pathlib.Path:
    """Return a temporary directory that is removed with its owner."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="topiary-"))
    # A finalizer, not `__del__`: it also runs when the interpreter exits.
    weakref.finalize(owner, shutil.rmtree, directory, ignore_errors=True)
    return directory


def keep(x: jax.Array | np.ndarray | DeviceArray, offload: Offload, path: pathlib.Path) -> Kept:
    """Move an array to a memory.

    Args:
      x: The array.
      offload: The memory.
      path: The file, if that is the disk.
    """
    if isinstance(x, DeviceArray):
        recorder = planner()
        return x if offload == "device" or not recorder else recorder.keep_off(x, offload)
    if offload == "device":
        return jax.numpy.asarray(x)
    value = np.asarray(x)
    if offload == "host":
        return value
    # NumPy's format stores bfloat16 as bare bytes, hence the dtype beside the path.
    np.save(path, value)
    return OnDisk(path, value.dtype, value.nbytes)


def fetch(kept: Kept) -> Any:
    """Return a kept array, on the device or in host memory."""
    return np.load(kept.path).view(kept.dtype) if isinstance(kept, OnDisk) else kept


class States(Sequence[jax.Array]):
    """Hidden states of all micro-batches, each [b t d]; an indexed one is on the devices.

    States that go to another memory are copied there while the next ones are computed, so the last
    ones that were set may still be on the devices.

    Args:
      xs: States in order; each is moved as it comes.
      offload: Memory to keep them in.
      mesh: Windows are split over its `data` axis, channels over `model`.
    """

    def __init__(
        self,
        xs: Iterable[jax.Array | np.ndarray],
        offload: Offload = "device",
        mesh: Mesh | None = None,
    ):
        self._offload, self.mesh = offload, mesh
        self._directory = scratch(self) if offload == "disk" else pathlib.Path()
        self._kept: list[Kept] = []
        self._moving: int | None = None  # index of those that are still on the devices
        for x in xs:
            self.append(x)

    def append(self, x: jax.Array | np.ndarray) -> None:
        """Add the states of one more micro-batch [b t d]."""
        self._kept.append(x)
        self._move(len(self._kept) - 1)

    def _move(self, j: int) -> None:
        """Begin to move states to their memory, and finish with those before them."""
        x = self._kept[j]
        if self._offload == "device":
            # Split first, so that each device holds its own part only.
            self._kept[j] = keep(split(x, self.mesh, STATES), "device", self._directory)
            return
        if isinstance(x, jax.Array):
            x.copy_to_host_async()
        self.settle()
        self._moving = j

    def settle(self) -> None:
        """Finish moving the states that were set last."""
        if self._moving is not None:
            j, self._moving = self._moving, None
            x = self._kept[j]
            assert not isinstance(x, OnDisk)
            self._kept[j] = keep(x, self._offload, self._directory / f"{j}.npy")

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, j: int) -> jax.Array: ...
    @overload
    def __getitem__(self, j: slice) -> list[jax.Array]: ...
    def __getitem__(self, j: int | slice) -> jax.Array | list[jax.Array]:
        if isinstance(j, slice):
            return [self[k] for k in range(*j.indices(len(self)))]
        # Placed as before it was kept. From another placement the compiler may make another
        # program, which rounds otherwise.
        return split(fetch(self._kept[j]), self.mesh, STATES)

    def __setitem__(self, j: int, x: jax.Array) -> None:
        if self._moving == j:
            self._moving = None  # what was there before need not be moved
        self._kept[j] = x
        self._move(j)

    def copy(self) -> "States":
        """Return the same states as an object of their own."""
        self.settle()
        return States((fetch(x) for x in self._kept), self._offload, self.mesh)

    def stored(self) -> list[Any]:
        """Return all states where they lie, files mapped into memory, for saving."""
        self.settle()
        return [
            np.load(x.path, mmap_mode="r").view(x.dtype) if isinstance(x, OnDisk) else x
            for x in self._kept
        ]
