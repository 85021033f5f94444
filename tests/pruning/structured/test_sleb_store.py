"""SLEB's stores of hidden states: division of the memory, and states by path."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pruning.structured.sleb_paths import Piece, whole_path
from pruning.structured.sleb_store import Store, StoreLimits, plan_stores

STATE = jnp.arange(4, dtype=jnp.float32)  # 16 bytes
PATH = whole_path(4)


@pytest.mark.parametrize("device", [0, 1, 5, 21, 22, 60, 1000])
@pytest.mark.parametrize("host", [0, 1, 6, 30, 1000])
@pytest.mark.parametrize("disk", [0, 40])
def test_stores_take_no_more_memory_than_is_available(device: int, host: int, disk: int) -> None:
    available = (device, host, disk)
    shared, own = plan_stores(8, 3, available)
    assert all(a + b <= room for a, b, room in zip(shared.bytes, own.bytes, available, strict=True))
    assert shared.every <= 4
    if sum(available) >= 21:
        assert shared.every == 1 and sum(shared.bytes) == 21
        assert shared.bytes[:2] == (
            min(device, 21),
            min(host, 21 - min(device, 21)),
        )  # the fastest first
    else:
        assert own.every == 0
    assert (own.every == 1) == (sum(available) - 21 >= 28 * 3)


@pytest.mark.parametrize("memory", [0, 1, 2])
def test_states_come_back_from_every_memory(memory: int, tmp_path: pathlib.Path) -> None:
    limits = [0, 0, 0]
    limits[memory] = 16
    store = Store(StoreLimits(1, tuple(limits)), tmp_path)
    store.put(0, PATH[:2], STATE)
    kept = store.get(0, PATH[:2])
    assert kept is not None and np.array_equal(kept, STATE)
    assert store.get(1, PATH[:2]) is None and store.get(0, PATH[:1]) is None
    assert store.most == limits


def test_a_full_store_keeps_no_more_states(tmp_path: pathlib.Path) -> None:
    store = Store(StoreLimits(1, (16, 0, 0)), tmp_path)
    for m in (0, 1):
        store.put(m, PATH[:1], STATE)
    assert store.get(0, PATH[:1]) is not None and store.get(1, PATH[:1]) is None


def test_states_are_kept_at_every_second_piece(tmp_path: pathlib.Path) -> None:
    store = Store(StoreLimits(2, (1000, 0, 0)), tmp_path)
    for length in range(1, 5):
        store.put(0, PATH[:length], STATE)
    assert [store.get(0, PATH[:k]) is not None for k in range(1, 5)] == [False, True, False, True]


def test_a_removed_piece_takes_its_states_and_files_along(tmp_path: pathlib.Path) -> None:
    """Their memory serves other states."""
    store = Store(StoreLimits(1, (0, 0, 32)), tmp_path)
    for length in (1, 2):
        store.put(0, PATH[:length], STATE)
    assert len(list(tmp_path.iterdir())) == 2
    store.forget(Piece(1))
    assert store.get(0, PATH[:2]) is None and store.get(0, PATH[:1]) is not None
    assert len(list(tmp_path.iterdir())) == 1
    store.put(1, PATH[:3], STATE)
    assert store.get(1, PATH[:3]) is not None
