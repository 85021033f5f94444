"""One table from what an axis means to the mesh axis it is split over, and the few placements made from it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from models.errors import InputError
from models.programs import DeviceArray, Recorder, planner

MESH_AXES = ("data", "model")
LOGICAL = {"sample": "data", "out": "model"}  # calibration windows; output rows of a linear


def make_mesh(spec: str, batch: int = 0, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from a text such as "data=4,model=2"; empty puts all devices on `data`.

    Args:
      batch: windows in one micro-batch, which `data` must divide; 0 for any. An empty text then takes as many devices as do divide it:
        one that does not would repeat all the work on every device.
      devices: to choose from, the first ones are taken; None: all, of every process.
    Raises InputError for a malformed text, one that asks for more devices than there are, leaves a whole process without any, or does
    not divide the batch.
    """
    every = jax.devices() if devices is None else devices
    sizes = {"data": max(n for n in range(1, len(every) + 1) if batch % n == 0)} if not spec else {}
    for part in filter(None, spec.split(",")):
        found = re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip())
        if not found or found[1] not in MESH_AXES or found[1] in sizes:
            raise InputError(
                f"--mesh={spec!r} must be like data=4,model=2 (axes {', '.join(MESH_AXES)})"
            )
        sizes[found[1]] = int(found[2])
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = shape[0] * shape[1]
    if needed > len(every):
        raise InputError(
            f"--mesh={spec!r} needs {needed} devices, there are {len(every)}: ask for fewer"
        )
    if batch % shape[0]:
        raise InputError(
            f"--mesh={spec!r} splits micro-batches of {batch} windows over {shape[0]} devices: make the batch a multiple of it"
        )
    if devices is None and jax.process_count() > len({d.process_index for d in every[:needed]}):
        raise InputError(
            f"--mesh={spec!r} leaves processes idle: choose a mesh of all {len(every)} devices, and a batch that data divides"
        )
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 2, devices=every[:needed])


def placement(shape: Sequence[int], mesh: Mesh | None, logical: str) -> Sharding:
    """The first axis split over the mesh axis of `logical` where that divides it, else every device has the whole."""
    if mesh is None or mesh.size == 1:
        return SingleDeviceSharding(jax.local_devices()[0])
    axis = LOGICAL[logical]
    return NamedSharding(
        mesh, PartitionSpec(axis) if shape and shape[0] % mesh.shape[axis] == 0 else PartitionSpec()
    )


def specs_on(tree: Any, mesh: Mesh, logical: str = "") -> Any:
    """Shapes, of ShapeDtypeStructs, with the placements that `split` (with a `logical`) or `place` gives to such arrays."""

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = LOGICAL[logical or "out"]
        along = len(x.shape) == 2 if not logical else bool(x.shape)
        spec = (
            PartitionSpec(axis) if along and x.shape[0] % mesh.shape[axis] == 0 else PartitionSpec()
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def _put(x: Any, sharding: Sharding) -> jax.Array:
    """`x`, which every process holds whole unless it lies over their devices already; a process moves only what its own devices get."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    held = np.asarray(x)
    return jax.make_array_from_callback(held.shape, sharding, lambda part: held[part])


def _planned(recorder: Recorder, x: Any, mesh: Mesh | None, logical: str) -> DeviceArray:
    """Place the shape of an array as `split` and `place` place the array itself."""
    if isinstance(x, DeviceArray) and x.place == "device":
        return x
    if mesh is None or mesh.size == 1 or (logical == "out" and len(x.shape) != 2):
        return recorder.place(x)
    return recorder.place(x, placement(x.shape, mesh, logical))


def split(x: Any, mesh: Mesh | None, logical: str) -> Any:
    """`x` where `placement` says."""
    if recorder := planner():
        return _planned(recorder, x, mesh, logical)
    if mesh is None or mesh.size == 1:
        return jax.numpy.asarray(x)
    return _put(x, placement(x.shape, mesh, logical))


def to_host(x: Any) -> np.ndarray:
    """An array whole in host memory, in every process, wherever it lies; where it lies over several, all of them must call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def tree_to_host(tree: Any) -> Any:
    """Return a tree with every array in host memory, as `to_host` gives it."""
    return jax.tree.map(to_host, tree)


def own_rows(shape: Sequence[int], mesh: Mesh | None) -> slice:
    """The rows of a parameter that `place` gives to this process's devices."""
    if mesh is None or len(shape) != 2:
        return slice(None)
    parts = [
        index[0]
        for index in placement(shape, mesh, "out")
        .addressable_devices_indices_map(tuple(shape))
        .values()
        if index
    ]
    start, stop = min(p.start or 0 for p in parts), max(p.stop or shape[0] for p in parts)
    return slice(None) if stop - start == shape[0] else slice(start, stop)


def local(params: Any) -> Any:
    """Parameters that this process can use by itself: what lies over several is gathered into host memory."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else to_host(x), params)


def place(params: Any, mesh: Mesh | None) -> Any:
    """Parameters on the mesh: the output rows of matrices split over `model`, vectors on every device."""
    if recorder := planner():
        return jax.tree.map(lambda w: _planned(recorder, w, mesh, "out"), params)
    if mesh is None or mesh.size == 1:
        return params
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda w: split(w, mesh, "out") if w.ndim == 2 else _put(w, whole), params)
