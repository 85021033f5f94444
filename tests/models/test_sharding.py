"""Meshes from texts, and what is placed where on eight devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from models.errors import InputError
from models.sharding import STATES, constrain, make_mesh, place, split


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("", (8, 1)),
        ("data=8", (8, 1)),
        ("data=4,model=2", (4, 2)),
        ("model=2, data=4", (4, 2)),
        ("model=8", (1, 8)),
        ("data=3", (3, 1)),
        ("data=1", (1, 1)),
    ],
)
def test_a_mesh_has_the_axes_of_its_text(spec: str, shape: tuple[int, int]) -> None:
    mesh = make_mesh(spec)
    assert (mesh.axis_names, mesh.devices.shape) == (("data", "model"), shape)
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "spec",
    [
        "data",
        "data=",
        "data=0",
        "data=-1",
        "data=2.5",
        "data=two",
        "rows=2",
        "data=2,data=4",
        "4x2",
        "data=2 model=2",
    ],
)
def test_a_malformed_mesh_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match=r"must be like data=4,model=2") as caught:
        make_mesh(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(("spec", "needed"), [("data=9", 9), ("data=4,model=4", 16)])
def test_a_mesh_of_too_many_devices_is_refused(spec: str, needed: int) -> None:
    with pytest.raises(InputError, match=f"needs {needed} devices, there are 8"):
        make_mesh(spec)


def pieces(x: jax.Array) -> set[tuple[int, ...]]:
    return {s.data.shape for s in x.addressable_shards}


def test_split_divides_the_first_axis_or_repeats() -> None:
    mesh, x = make_mesh("data=4,model=2"), np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    samples, rows = split(x, mesh, "sample"), split(x, mesh, "out")
    assert pieces(samples) == {(2, 3)} and samples.sharding.spec == PartitionSpec("data")
    assert pieces(rows) == {(4, 3)} and rows.sharding.spec == PartitionSpec("model")
    uneven = split(x[:6], mesh, "sample")
    assert pieces(uneven) == {(6, 3)} and len(uneven.addressable_shards) == 8
    for out, expected in ((samples, x), (rows, x), (uneven, x[:6])):
        np.testing.assert_array_equal(out, expected)
    assert pieces(split(np.float32(1), mesh, "sample")) == {()}


def test_hidden_states_are_split_by_windows_and_by_channels() -> None:
    mesh, x = make_mesh("data=4,model=2"), np.arange(4 * 3 * 6, dtype=np.float32).reshape(4, 3, 6)
    states = split(x, mesh, STATES)
    assert pieces(states) == {(1, 3, 3)}
    assert pieces(split(x[:3, :, :5], mesh, STATES)) == {(3, 3, 5)}  # neither axis divides
    assert pieces(split(x[None], mesh, STATES)) == {(1, 1, 3, 3)}
    np.testing.assert_array_equal(states, x)


def test_place_splits_rows_of_matrices_alone() -> None:
    params = {
        "w": np.ones((8, 6), np.float32),
        "odd": np.ones((5, 6), np.float32),
        "b": np.ones(8, np.float32),
        "none": None,
    }
    placed = place(params, make_mesh("data=2,model=4"))
    assert (pieces(placed["w"]), pieces(placed["odd"]), pieces(placed["b"]), placed["none"]) == (
        {(2, 6)},
        {(5, 6)},
        {(8,)},
        None,
    )
    assert all(len(placed[k].addressable_shards) == 8 for k in ("w", "odd", "b"))


def test_fully_sharded_rows_lie_on_all_devices_that_divide_them() -> None:
    mesh = make_mesh("data=4,model=2")
    tree = {"w": np.ones((16, 3)), "few": np.ones((6, 3)), "odd": np.ones((5, 3)), "b": np.ones(16)}
    placed = jax.jit(lambda t: constrain(t, mesh, "fully_sharded"))(jax.tree.map(np.float32, tree))
    shapes = {name: pieces(x) for name, x in placed.items()}
    assert shapes == {"w": {(2, 3)}, "few": {(3, 3)}, "odd": {(5, 3)}, "b": {(16,)}}
    assert placed["w"].sharding.spec[0] == ("model", "data")
    # A block gathered over `data` lies as `place` has it.
    used = jax.jit(lambda t: constrain(t, mesh, "out"))(placed)
    for name, x in place(jax.tree.map(np.float32, tree), mesh).items():
        assert used[name].sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("mesh", [None, "data=1"])
def test_one_device_moves_nothing(mesh: str | None) -> None:
    on = None if mesh is None else make_mesh(mesh)
    params = {"w": jax.numpy.ones((4, 4))}
    assert place(params, on) is params
    assert split(params["w"], on, "sample") is params["w"]


@pytest.mark.parametrize(
    ("batch", "data"), [(0, 8), (8, 8), (4, 4), (6, 6), (7, 7), (1, 1), (9, 3), (16, 8)]
)
def test_a_mesh_takes_no_more_devices_than_divide_the_batch(batch: int, data: int) -> None:
    assert make_mesh("", batch).devices.shape == (data, 1)
    if data < 8:
        with pytest.raises(InputError, match=f"micro-batches of {batch} windows over 8"):
            make_mesh("data=8", batch)
