"""One table from what an axis means to the mesh axis it is split over, and the few placements made from it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from models.errors import InputError

MESH_AXES = ("data", "model")
LOGICAL = {"sample": "data", "out": "model"}  # calibration windows; output rows of a linear


def make_mesh(spec: str, batch: int = 0, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from a text such as "data=4,model=2"; empty puts all local devices on `data`.

    Args:
      batch: windows in one micro-batch, which `data` must divide; 0 for any. An empty text then takes as many devices as do divide it:
        one that does not would repeat all the work on every device.
      devices: to choose from, the first ones are taken; None: the local ones.
    Raises InputError for a malformed text, one that asks for more devices than there are, or one that does not divide the batch.
    """
    devices = jax.local_devices() if devices is None else devices
    sizes = {"data": max(n for n in range(1, len(devices) + 1) if batch % n == 0)} if not spec else {}
    for part in filter(None, spec.split(",")):
        found = re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip())
        if not found or found[1] not in MESH_AXES or found[1] in sizes:
            raise InputError(f"--mesh={spec!r} must be like data=4,model=2 (axes {', '.join(MESH_AXES)})")
        sizes[found[1]] = int(found[2])
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = shape[0] * shape[1]
    if needed > len(devices):
        raise InputError(f"--mesh={spec!r} needs {needed} devices, there are {len(devices)}: ask for fewer")
    if batch % shape[0]:
        raise InputError(
            f"--mesh={spec!r} splits micro-batches of {batch} windows over {shape[0]} devices: make the batch a multiple of it"
        )
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 2, devices=devices[:needed])


def placement(shape: Sequence[int], mesh: Mesh | None, logical: str) -> Sharding:
    """The first axis split over the mesh axis of `logical` where that divides it, else every device has the whole."""
    if mesh is None or mesh.size == 1:
        return SingleDeviceSharding(jax.local_devices()[0])
    axis = LOGICAL[logical]
    return NamedSharding(mesh, PartitionSpec(axis) if shape and shape[0] % mesh.shape[axis] == 0 else PartitionSpec())


def specs_on(tree: Any, mesh: Mesh, logical: str = "") -> Any:
    """Shapes, of ShapeDtypeStructs, with the placements that `split` (with a `logical`) or `place` gives to such arrays."""

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = LOGICAL[logical or "out"]
        along = len(x.shape) == 2 if not logical else bool(x.shape)
        spec = PartitionSpec(axis) if along and x.shape[0] % mesh.shape[axis] == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def split(x: Any, mesh: Mesh | None, logical: str) -> jax.Array:
    """`x` where `placement` says."""
    if mesh is None or mesh.size == 1:
        return jax.numpy.asarray(x)
    return jax.device_put(x, placement(x.shape, mesh, logical))


def place(params: Any, mesh: Mesh | None) -> Any:
    """Parameters on the mesh: the output rows of matrices split over `model`, vectors on every device."""
    if mesh is None or mesh.size == 1:
        return params
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda w: split(w, mesh, "out") if w.ndim == 2 else jax.device_put(w, whole), params)
