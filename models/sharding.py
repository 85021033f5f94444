"""Placement of arrays on a mesh: one table from logical axes to mesh axes, and its users."""

import math
import re
from collections.abc import Mapping, Sequence
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
# Logical axis -> mesh axes: calibration windows, output rows of a linear, channels that statistics
# are of, and the rows of what a training keeps between two steps, of which every device holds a
# part of its own.
# Rows, not columns: a row's products and Wanda's mask of it then need no other device.
LOGICAL: Mapping[str, tuple[str, ...]] = {
    "sample": ("data",),
    "out": ("model",),
    "channel": ("model",),
    "fully_sharded": ("model", "data"),
}
STATES = "states"  # in place of a logical axis, for hidden states [... b t d]


def _parse_mesh(spec: str) -> dict[str, int]:
    """Parse a text such as "data=4,model=2" into the sizes of mesh axes."""
    sizes: dict[str, int] = {}
    for part in filter(None, spec.split(",")):
        match = re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip())
        if not match or match[1] not in MESH_AXES or match[1] in sizes:
            raise InputError(
                f"must be like data=4,model=2 (axes {', '.join(MESH_AXES)})",
                field="mesh",
                value=repr(spec),
            )
        sizes[match[1]] = int(match[2])
    return sizes


def make_mesh(spec: str, batch: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh from a text such as "data=4,model=2".

    An empty text puts devices on `data` alone: as many as divide the batch, because the others
    would repeat the work of the first.

    Args:
      spec: Sizes of the mesh axes; an axis left out has size 1.
      batch: Windows in one micro-batch, which `data` must divide; 0 for any number.
      devices: Devices to choose from, of which the first are taken; None for all devices of all
        processes.

    Returns:
      Mesh with the axes `data` and `model`.

    Raises:
      InputError: The text is malformed, asks for more devices than there are, leaves a process
        without any, or does not divide the batch.
    """
    available = jax.devices() if devices is None else devices
    sizes = _parse_mesh(spec)
    if not spec:
        sizes["data"] = max(n for n in range(1, len(available) + 1) if batch % n == 0)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = shape[0] * shape[1]
    if needed > len(available):
        raise InputError(
            f"needs {needed} devices, there are {len(available)}",
            "ask for fewer",
            field="mesh",
            value=repr(spec),
        )
    if batch % shape[0]:
        raise InputError(
            f"splits micro-batches of {batch} windows over {shape[0]} devices",
            f"make the batch a multiple of {shape[0]}",
            field="mesh",
            value=repr(spec),
        )
    # A process without a device could not take part in collective operations.
    processes_used = len({d.process_index for d in available[:needed]})
    if devices is None and jax.process_count() > processes_used:
        raise InputError(
            "leaves processes idle",
            f"choose a mesh of all {len(available)} devices, and a batch that data divides",
            field="mesh",
            value=repr(spec),
        )
    # Auto axes: jax.make_mesh defaults to Explicit ones, which want a sharding in every type.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, MESH_AXES, axis_types, devices=available[:needed])


def placement(shape: Sequence[int], mesh: Mesh | None, logical: str) -> Sharding:
    """Choose the sharding of hidden states, or of an array whose first axis has a logical name.

    Args:
      shape: Shape of the array.
      mesh: Mesh; None for the first local device.
      logical: Logical name of the first axis, a key of `LOGICAL`; STATES for hidden states.

    Returns:
      Axes split over their mesh axes where these divide them, else replicated.
    """
    if mesh is None or mesh.size == 1:
        return SingleDeviceSharding(jax.local_devices()[0])
    if logical == STATES:
        return NamedSharding(mesh, _split_states(shape, mesh))
    # An axis that does not divide is replicated rather than padded: padding would enter the
    # statistics.
    return NamedSharding(mesh, _split_over(shape[:1], mesh, logical))


def _split_states(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return how hidden states [... b t d] are split: by their windows and by their channels.

    A linear's outputs are split over `model` as its rows are, so the compiler leaves a block's
    outputs like this too: no device sends any between two blocks, and one program serves all.
    """
    windows, channels = (
        _split_over((shape[axis],), mesh, logical)
        for axis, logical in ((-3, "sample"), (-1, "out"))
    )
    before = (None,) * (len(shape) - 3)
    return PartitionSpec(*before, *(windows or (None,)), None, *(channels or (None,)))


def _split_over(rows: Sequence[int], mesh: Mesh, logical: str) -> PartitionSpec:
    """Return how a first axis is split, if there is one: over all of its mesh axes that divide it.

    Args:
      rows: Size of the first axis; empty for a scalar.
      mesh: Mesh.
      logical: Logical name of the axis.
    """
    axes = LOGICAL[logical]
    # Without the last ones first: the others are where the array is used.
    while rows and axes and rows[0] % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    if not rows or not axes:
        return PartitionSpec()
    return PartitionSpec(axes[0] if len(axes) == 1 else axes)


def specs_on(tree: Any, mesh: Mesh, logical: str = "") -> Any:
    """Add the placements to a tree of shapes that arrays of these shapes would have.

    Args:
      tree: Pytree of jax.ShapeDtypeStruct.
      mesh: Mesh.
      logical: Logical name of the first axes, as in `split`; empty for parameters, as in `place`.

    Returns:
      The tree with shardings.
    """

    def with_sharding(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Of parameters only matrices are split.
        may_split = bool(x.shape) if logical else len(x.shape) == 2
        spec = _split_over(x.shape[:1] if may_split else (), mesh, logical or "out")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, tree)


def _put_on_devices(x: Any, sharding: Sharding) -> jax.Array:
    """Put `x` on devices; every process holds it whole unless it is global already."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    # A callback, so that a process moves only the parts of its own devices.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _planned(recorder: Recorder, x: Any, mesh: Mesh | None, logical: str) -> DeviceArray:
    """Place the shape of an array as `split` and `place` place the array itself."""
    on_device = isinstance(x, DeviceArray) and x.place == "device"
    if mesh is None or mesh.size == 1 or (logical == "out" and len(x.shape) != 2):
        return x if on_device else recorder.place(x)
    sharding = placement(x.shape, mesh, logical)
    if on_device and x.sharding.is_equivalent_to(sharding, len(x.shape)):
        return x
    return recorder.place(x, sharding)


def split(x: Any, mesh: Mesh | None, logical: str) -> Any:
    """Put an array on the mesh, its first axis split as `placement` says.

    Args:
      x: Array, on the host or on devices.
      mesh: Mesh; None leaves the array on its device.
      logical: Logical name of the first axis, or STATES.

    Returns:
      Array on the mesh.
    """
    recorder = planner()
    if recorder:
        return _planned(recorder, x, mesh, logical)
    if mesh is None or mesh.size == 1:
        return jax.numpy.asarray(x)
    return _put_on_devices(x, placement(x.shape, mesh, logical))


def to_host(x: Any) -> np.ndarray:
    """Copy a whole array into host memory, in every process.

    All processes must call this where the array is spread over several.

    Args:
      x: Array, on the host or on devices.

    Returns:
      Array in host memory.
    """
    # Only an array that is spread over processes needs communication.
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def tree_to_host(tree: Any) -> Any:
    """Return a tree with every array in host memory, as `to_host` gives it."""
    return jax.tree.map(to_host, tree)


def own_rows(shape: Sequence[int], mesh: Mesh | None) -> slice:
    """Return the rows of a parameter that `place` gives to this process's devices.

    Args:
      shape: Shape of the parameter.
      mesh: Mesh; None for one device.

    Returns:
      Slice of the first axis, slice(None) for all rows.
    """
    if mesh is None or len(shape) != 2:
        return slice(None)
    indices = placement(shape, mesh, "out").addressable_devices_indices_map(tuple(shape)).values()
    # A replicated matrix has whole slices, whose start and stop are None.
    rows = [index[0] for index in indices if index]
    start = min(r.start or 0 for r in rows)
    stop = max(r.stop or shape[0] for r in rows)
    return slice(None) if stop - start == shape[0] else slice(start, stop)


def local(params: Any) -> Any:
    """Make parameters usable by this process alone.

    Args:
      params: Pytree of arrays.

    Returns:
      The tree, arrays spread over several processes gathered into host memory.
    """
    return jax.tree.map(lambda x: x if x.is_fully_addressable else to_host(x), params)


def place(params: Any, mesh: Mesh | None) -> Any:
    """Put parameters on the mesh.

    Args:
      params: Pytree of arrays.
      mesh: Mesh; None leaves them on their device.

    Returns:
      The tree, output rows of matrices split over `model`, vectors on every device.
    """
    recorder = planner()
    if recorder:
        return jax.tree.map(lambda w: _planned(recorder, w, mesh, "out"), params)
    if mesh is None or mesh.size == 1:
        return params
    # Vectors are small beside matrices, so a copy on each device costs little.
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda w: split(w, mesh, "out") if w.ndim == 2 else _put_on_devices(w, whole), params
    )


def spread_tokens(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Tell the compiler to split hidden states by their windows and by their channels.

    For states of all windows that a program keeps: the channels are on every device otherwise.

    Args:
      x: Traced hidden states, [... b t d].
      mesh: Mesh; None for one device.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, placement(x.shape, mesh, STATES))


def constrain(tree: Any, mesh: Mesh | None, logical: str) -> Any:
    """Tell the compiler how arrays within a program lie on the mesh.

    Args:
      tree: Pytree of traced arrays.
      mesh: Mesh; None for one device.
      logical: Logical name of the first axes; except for "sample", only matrices are split.

    Returns:
      The tree.
    """
    if mesh is None or mesh.size == 1:
        return tree

    def placed(x: jax.Array) -> jax.Array:
        may_split = logical == "sample" or x.ndim == 2
        spec = _split_over(x.shape[:1] if may_split else (), mesh, logical)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)
