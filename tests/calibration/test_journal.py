"""Finished steps survive: what is read back is what was computed, a step is computed once, and damage is told."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from calibration.journal import Journal, StepCache, digest, to_serialisable
from models.errors import InputError
from models.sharding import make_mesh, split

PRINT = {"--sparsity": 0.5, "weights": {"a": "b" * 64}}


class Sink:
    """Counts; rewinds."""

    def __init__(self) -> None:
        self.at = 0

    def mark(self) -> int:
        return self.at

    def rewind(self, mark: int) -> None:
        self.at = mark


def never() -> Any:
    raise AssertionError("the step was finished")


VALUE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": [1, 2.5, "text", None, True, float("inf")],
    "c": {"d": np.zeros((0, 3), np.int64), "e": np.array([True, False])},
    "f": [0.1 + 0.2, np.float64(1 / 3).item()],
}


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        np.testing.assert_array_equal(x, y)


def test_a_step_is_computed_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    first = Journal(tmp_path, PRINT, Sink())
    assert first.finished == 0
    assert_same(first.step(lambda: VALUE), VALUE)
    assert first.step(lambda: (1, jnp.ones(2)))[0] == 1
    again = Journal(tmp_path, PRINT, Sink())
    assert again.finished == 2
    assert_same(again.step(never), VALUE)
    assert_same(again.step(never), [1, np.ones(2, np.float32)])
    assert again.step(lambda: "third") == "third"


def test_without_a_file_a_value_has_the_same_form() -> None:
    assert_same(to_serialisable({1: (jnp.ones(2), 3)}), {"1": [np.ones(2, np.float32), 3]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["", "data=4,model=2"])
def test_a_walk_goes_on_with_the_states_it_had(dtype: str, mesh: str, tmp_path: Path) -> None:
    m = make_mesh(mesh) if mesh else None
    states = [
        split(jax.random.normal(jax.random.key(i), (n, 3, 5)).astype(dtype), m, "sample")
        for i, n in enumerate((4, 3))
    ]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in states]
    sink = Sink()
    first = Journal(tmp_path, PRINT, sink)
    assert first.begin(like) == ([], None)
    sink.at = 1
    first.reach(1, [{"x": 1.5}], states)
    again = Journal(tmp_path, PRINT, other := Sink())
    assert other.at == 1 and again.finished == 1
    records, found = again.begin(like)
    assert records == [{"x": 1.5}]
    for x, y in zip(found or [], states, strict=True):
        assert x.dtype == y.dtype == ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    again.complete([{"x": 1.5}, None])
    last = Journal(tmp_path, PRINT, Sink())
    assert last.begin(like) == ([{"x": 1.5}, None], None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.msgpack", "journal.json"]


def test_a_walk_without_states(tmp_path: Path) -> None:
    first = Journal(tmp_path, PRINT, Sink())
    first.begin([])
    first.reach(1, ["a"], [])
    assert Journal(tmp_path, PRINT, Sink()).begin([]) == (["a"], [])


def test_saving_takes_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is saved at once, the others when ten times the cost of saving has gone by."""
    now = 0.0
    monkeypatch.setattr("calibration.journal.time.monotonic", lambda: now)
    journal, saved = Journal(tmp_path, PRINT, Sink()), []
    commit = journal._commit

    def slow(*args: Any) -> None:
        nonlocal now
        commit(*args)
        now += 1.0
        saved.append(block)

    monkeypatch.setattr(journal, "_commit", slow)
    journal.begin([])
    for block in range(1, 30):
        now += 2.0
        journal.reach(block, [None] * block, [])
    assert saved == [1, 6, 11, 16, 21, 26]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"--sparsity": 0.6},
            r"had another --sparsity \(0.5, now 0.6\): repeat its command to go on, or begin anew with --noresume",
        ),
        ({"weights": {"a": "c" * 64}}, r"had another weights: repeat"),
        ({"--pattern": "2:4"}, r'--pattern \(null, now "2:4"\)'),
    ],
)
def test_another_run_is_refused_and_told_apart(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    Journal(tmp_path, PRINT, Sink()).step(lambda: 1)
    with pytest.raises(InputError, match=said):
        Journal(tmp_path, PRINT | change, Sink())
    assert Journal(tmp_path, PRINT, Sink()).step(never) == 1


@pytest.mark.parametrize("name", ["journal.json", "000.msgpack", "001-001.msgpack", "001-001"])
@pytest.mark.parametrize("how", ["gone", "cut short"])
def test_damage_is_told(name: str, how: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path, PRINT, Sink())
    journal.step(lambda: 1)
    journal.begin([jax.ShapeDtypeStruct((2,), np.float32)])
    journal.reach(1, [None], [jnp.ones(2)])
    path = tmp_path / name
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        file.unlink() if how == "gone" else file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(
        InputError,
        match=rf"{name} of the unfinished run is damaged or missing: start over with noresume",
    ):
        Journal(tmp_path, PRINT, Sink())


def test_the_index_is_whole_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, PRINT, Sink())
    journal.step(lambda: "first")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("os.replace", fail)
        with pytest.raises(OSError, match="No space"):
            journal.step(lambda: "second")
    again = Journal(tmp_path, PRINT, Sink())
    assert again.step(never) == "first" and again.step(lambda: "new") == "new"
    assert json.loads((tmp_path / "journal.json").read_text())["steps"] == [
        "000.msgpack",
        "001.msgpack",
    ]


def test_a_run_killed_in_its_first_write_begins_anew(tmp_path: Path) -> None:
    """Nothing counts yet, so nothing is lost; with anything else there, the index is gone."""
    (tmp_path / "journal.json.new").write_text('{"finger')
    assert Journal(tmp_path, PRINT, Sink()).finished == 0
    (tmp_path / "journal.json").rename(tmp_path / "journal.json.new")
    (tmp_path / "000.msgpack").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"journal\.json of the unfinished run is damaged or missing"
    ):
        Journal(tmp_path, PRINT, Sink())


def test_what_another_run_computed_is_not_computed_again(tmp_path: Path) -> None:
    memory = StepCache()
    assert_same(
        Journal(tmp_path / "a", PRINT, Sink(), memory, "model").step(lambda: VALUE, "key"), VALUE
    )
    assert_same(Journal(tmp_path / "b", PRINT, Sink(), memory, "model").step(never, "key"), VALUE)
    assert memory.reused == 1
    assert_same(
        Journal(tmp_path / "b", PRINT, Sink()).step(never), VALUE
    )  # it is as durable as one's own


@pytest.mark.parametrize(
    ("common", "key"), [("another model", "key"), ("model", "another key"), ("model", None)]
)
def test_what_depends_on_something_else_is_computed(
    common: str, key: str | None, tmp_path: Path
) -> None:
    memory = StepCache()
    for k, run in enumerate(("a", "b")):
        Journal(tmp_path / run, PRINT, Sink(), memory, "model").step(
            lambda k=k: k, None if key is None else "key"
        )
    assert Journal(tmp_path / "c", PRINT, Sink(), memory, common).step(lambda: 7, key) == 7


def test_a_step_read_back_is_known_to_other_runs(tmp_path: Path) -> None:
    Journal(tmp_path / "a", PRINT, Sink()).step(lambda: VALUE)
    memory = StepCache()
    assert_same(Journal(tmp_path / "a", PRINT, Sink(), memory).step(never, "key"), VALUE)
    assert_same(Journal(tmp_path / "b", PRINT, Sink(), memory).step(never, "key"), VALUE)


def test_a_walk_that_another_run_finished_is_over_at_once(tmp_path: Path) -> None:
    """Also where this run was interrupted in the middle of it."""
    memory = StepCache()
    Journal(tmp_path / "a", PRINT, Sink(), memory).complete([1, 2, 3], "walk")
    cut = Journal(tmp_path / "b", PRINT, Sink())
    cut.reach(1, [1], [jnp.ones(2)])
    went_on = Journal(tmp_path / "b", PRINT, Sink(), memory)
    assert went_on.begin([jax.ShapeDtypeStruct((2,), np.float32)], "walk") == ([1, 2, 3], None)
    went_on.complete([1, 2, 3], "walk")
    assert Journal(tmp_path / "b", PRINT, Sink()).begin([]) == ([1, 2, 3], None)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["000.msgpack", "journal.json"]


def test_memory_holds_no_more_than_it_may() -> None:
    memory = StepCache(limit=100)
    for name in "abc":
        memory.keep(name, {"x": np.zeros(10, np.float32)})
    assert memory.get("a") is None and memory.get("b") is not None and memory.get("c") is not None
    memory.keep("d", np.zeros(26, np.float32))
    assert [name for name in "abcd" if memory.get(name) is not None] == [
        "b",
        "c",
    ]  # it alone is too large


def test_digests_tell_numbers_shapes_and_types_apart() -> None:
    a = np.arange(6, dtype=np.int32)
    others = [a[::-1], a.reshape(2, 3), a.astype(np.int64), a[:5]]
    assert len({digest(x) for x in [a, *others]}) == 5 and digest(a.copy()) == digest(a)
