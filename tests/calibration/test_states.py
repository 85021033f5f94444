"""Hidden states are the same wherever they are kept, and a walk is."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from calibration.journal import Journal
from calibration.passes import BlockResult, visit_blocks
from calibration.runtime import Runtime
from calibration.states import (
    OFFLOADS,
    Offload,
    OnDisk,
    States,
    available_memory,
    choose_offload,
    keep,
)
from models.arch import Block, apply_block
from models.sharding import STATES, make_mesh, split
from reference.small import model, tokens


class Sink:
    """Keeps nothing."""

    blocks, files = 0, ()

    def mark(self) -> None: ...
    def rewind(self, mark: None) -> None: ...


def batches(dtype: str = "float32") -> list[jax.Array]:
    return [
        jax.random.normal(jax.random.key(i), (n, 3, 4)).astype(dtype) for i, n in enumerate((4, 2))
    ]


@pytest.mark.parametrize("mesh", ["", "data=2,model=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_was_kept_comes_back_on_the_devices(offload: Offload, dtype: str, mesh: str) -> None:
    m, xs = make_mesh(mesh) if mesh else None, batches(dtype)
    states = States(iter(xs), offload, m)
    states[1] = xs[1] + 1
    other = states.copy()
    other[0] = xs[0] * 2
    for found, wanted in ((states, [xs[0], xs[1] + 1]), (other, [xs[0] * 2, xs[1] + 1])):
        assert len(found) == 2 and found[1:][0].shape == (2, 3, 4)
        for x, y, saved in zip(found, wanted, found.stored(), strict=True):
            assert (
                isinstance(x, jax.Array)
                and x.dtype == dtype
                and x.sharding == split(y, m, STATES).sharding
            )
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(np.asarray(saved), y)
            assert saved.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
            assert isinstance(saved, jax.Array) == (offload == "device")


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_states_are_copied_while_the_next_are_computed(
    offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk must not wait for a micro-batch before it hands the next one to the devices."""
    x, waited = batches()[0], []

    def noted(value: Any, *where: Any) -> Any:
        waited.append(float(value[0, 0, 0]))
        return keep(value, *where)

    states = States([x, x, x], offload)
    states.settle()
    monkeypatch.setattr("calibration.states.keep", noted)
    for j in range(3):
        states[j] = x.at[0, 0, 0].set(j)
        assert waited == list(range(j))  # all before this one
        assert isinstance(states[j], jax.Array) and float(states[j][0, 0, 0]) == j
    states[2] = x.at[0, 0, 0].set(7)  # in place of states that were not moved yet
    states.settle()
    assert waited == [0, 1, 7] and [float(y[0, 0, 0]) for y in states] == waited


def test_files_go_with_the_states() -> None:
    states = States(batches(), "disk")
    states.settle()
    (kept, _) = states._kept
    assert isinstance(kept, OnDisk) and kept.path.is_file()
    del states
    assert not kept.path.parent.exists()


def test_between_two_blocks_nothing_is_on_the_devices() -> None:
    """Of states in files; on a CPU host memory is the device's."""
    m, windows = model("llama"), tokens()[:6]
    (width,) = {w.shape[1] for w in [m.blocks[0].q.w]}

    def states() -> int:
        return sum(x.shape == (2, windows.shape[1], width) for x in jax.live_arrays())

    counts, before = [], states()

    def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
        counts.append(states())
        return BlockResult(block)

    visit_blocks(m, windows, Runtime(2, offload="disk"), visit, name="counting")
    assert max(counts) - before <= 1  # the one that was last run


@pytest.mark.parametrize("propagated", [False, True])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_walk_is_the_same_and_goes_on_wherever_its_states_are(
    offload: Offload, propagated: bool, tmp_path: Path
) -> None:
    m, windows = model("llama"), tokens()

    def walk(stop: int | None, journal: Journal | None, offload: Offload) -> list[Any]:
        def visit(i: int, block: Block, xs: States, last: bool) -> BlockResult:
            if i == stop:
                raise KeyboardInterrupt
            record = [np.asarray(x) for x in xs]
            if propagated:
                for j, x in enumerate(xs):
                    xs[j] = apply_block(m.arch, block, x)
            return BlockResult(block, record, propagated)

        return visit_blocks(
            m, windows, Runtime(4, None, offload, journal=journal), visit, name="walking"
        )

    whole = walk(None, None, "device")
    with pytest.raises(KeyboardInterrupt):
        walk(1, Journal(tmp_path, {}, Sink()), offload)
    again = walk(None, Journal(tmp_path, {}, Sink()), offload)
    assert len(whole) == len(again) == len(m.blocks)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("device", "host", "there", "offload"),
    [
        (25, 200, {"device": 100, "host": 400}, "device"),
        (26, 200, {"device": 100, "host": 400}, "host"),
        (26, 201, {"device": 100, "host": 400}, "disk"),
        (200, 200, {"device": 0, "host": 400}, "device"),  # a CPU's memory is the host's
        (201, 201, {"device": 0, "host": 400}, "disk"),
    ],
)
def test_states_go_to_the_fastest_memory_with_room(
    device: int, host: int, there: dict[str, int], offload: Offload
) -> None:
    assert choose_offload(device, host, there) == offload
    assert available_memory()["host"] > 1 << 28
