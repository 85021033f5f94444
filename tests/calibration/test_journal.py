"""The journal: a finished step is computed once and read back unchanged; damage is reported."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from calibration.digests import digest
from calibration.journal import Journal, to_serialisable
from calibration.journal_files import read_index
from calibration.step_cache import SMALL, StepCache
from models.errors import InputError
from models.sharding import STATES, make_mesh, split

FILES = ["000.msgpack", "journal.copy.json", "journal.json"]
FINGERPRINT = {"--sparsity": 0.5, "weights": {"a": "b" * 64}}


class Sink:
    """A sink whose blocks are files that hold their index."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory, self.blocks = directory, 0

    @property
    def files(self) -> list[Path]:
        return [self.directory / f"block-{i}" for i in range(self.blocks)] if self.directory else []

    def put(self) -> None:
        self.blocks += 1
        if self.directory:
            self.directory.mkdir(exist_ok=True)
            self.files[-1].write_text(f"block {self.blocks}")

    def mark(self) -> int:
        return self.blocks

    def rewind(self, mark: int | None) -> None:
        self.blocks = mark or 0


def never() -> Any:
    """Fail: a finished step must not be computed again."""
    raise AssertionError("the step was finished")


VALUE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": [1, 2.5, "text", None, True, float("inf")],
    "c": {"d": np.zeros((0, 3), np.int64), "e": np.array([True, False])},
    "f": [0.1 + 0.2, np.float64(1 / 3).item()],
}


def assert_same(a: Any, b: Any) -> None:
    """Compare two values by structure, types and numbers."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        np.testing.assert_array_equal(x, y)


def test_a_step_is_computed_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    first = Journal(tmp_path, FINGERPRINT, Sink())
    assert first.finished == 0
    assert_same(first.step(lambda: VALUE), VALUE)
    assert first.step(lambda: (1, jnp.ones(2)))[0] == 1
    again = Journal(tmp_path, FINGERPRINT, Sink())
    assert again.finished == 2
    assert_same(again.step(never), VALUE)
    assert_same(again.step(never), [1, np.ones(2, np.float32)])
    assert again.step(lambda: "third") == "third"


def test_a_serialisable_value_has_the_form_that_a_file_returns() -> None:
    assert_same(to_serialisable({1: (jnp.ones(2), 3)}), {"1": [np.ones(2, np.float32), 3]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["", "data=4,model=2"])
def test_an_interrupted_pass_resumes_with_the_states_it_had(
    dtype: str, mesh: str, tmp_path: Path
) -> None:
    m = make_mesh(mesh) if mesh else None
    states = [
        split(jax.random.normal(jax.random.key(i), (n, 3, 5)).astype(dtype), m, STATES)
        for i, n in enumerate((4, 3))
    ]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in states]
    sink = Sink()
    first = Journal(tmp_path, FINGERPRINT, sink)
    assert first.begin(like) == ([], None)
    sink.put()
    first.reach(1, [{"x": 1.5}], states)
    again = Journal(tmp_path, FINGERPRINT, other := Sink())
    assert other.blocks == 1 and again.finished == 1
    records, restored = again.begin(like)
    assert records == [{"x": 1.5}]
    for x, y in zip(restored or [], states, strict=True):
        assert x.dtype == y.dtype == ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    again.complete([{"x": 1.5}, None])
    last = Journal(tmp_path, FINGERPRINT, Sink())
    assert last.begin(like) == ([{"x": 1.5}, None], None)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


def test_a_pass_without_states_resumes_with_its_records(tmp_path: Path) -> None:
    first = Journal(tmp_path, FINGERPRINT, Sink())
    first.begin([])
    first.reach(1, ["a"], [])
    assert Journal(tmp_path, FINGERPRINT, Sink()).begin([]) == (["a"], [])


def test_saves_take_a_tenth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is saved at once, others after ten times the seconds of the last save."""
    now = 0.0
    monkeypatch.setattr("calibration.journal.time.monotonic", lambda: now)
    journal, saved = Journal(tmp_path, FINGERPRINT, Sink()), []
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
    ("change", "message"),
    [
        (
            {"--sparsity": 0.6},
            r"had another --sparsity \(0.5, now 0.6\): repeat its command to continue it, "
            r"or start over with noresume",
        ),
        ({"weights": {"a": "c" * 64}}, r"had another weights: repeat"),
        ({"--pattern": "2:4"}, r'--pattern \(null, now "2:4"\)'),
    ],
)
def test_another_run_is_refused_with_the_setting_that_differs(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    Journal(tmp_path, FINGERPRINT, Sink()).step(lambda: 1)
    with pytest.raises(InputError, match=message):
        Journal(tmp_path, FINGERPRINT | change, Sink())
    assert Journal(tmp_path, FINGERPRINT, Sink()).step(never) == 1


def damage(path: Path, how: str) -> None:
    """Damage a file, or one file of a directory."""
    file = max(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else path
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(data[:-3])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def run_of_three_steps(root: Path, computed: list[str], until: str = "end") -> Journal:
    """Run a measurement, a pass that puts two blocks, and another measurement."""

    def compute(name: str) -> str:
        computed.append(name)
        return name

    journal = Journal(root / "journal", FINGERPRINT, sink := Sink(root / "blocks"))
    assert journal.step(lambda: compute("first")) == "first"
    records, states = journal.begin([jax.ShapeDtypeStruct((2,), np.float32)])
    assert len(records) == sink.blocks or journal.finished == 3
    if states is not None:
        np.testing.assert_array_equal(np.asarray(states[0]), np.full(2, len(records)))
    records = list(records)
    for block in range(len(records), 2):
        sink.put()
        records.append(compute(f"block {block}"))
        if block == 0:
            journal.reach(1, records, [jnp.full(2, 1.0)])
            if until == "block":
                return journal
    journal.complete(records)
    assert journal.step(lambda: compute("last")) == "last"
    return journal


INTERRUPTED = {
    "journal/journal.json": [],
    "journal/journal.copy.json": [],
    "journal/000.msgpack": ["first"],
    "journal/001-001.msgpack": ["block 0"],
    "journal/001-001": ["block 0"],
    "blocks/block-0": ["block 0"],
}
ENDED = {
    "journal/journal.json": [],
    "journal/000.msgpack": ["first"],
    "journal/001.msgpack": ["block 0", "block 1"],
    "journal/002.msgpack": ["last"],
    "blocks/block-1": ["block 0", "block 1"],
}


@pytest.mark.parametrize("how", ["missing", "cut short", "one bit"])
@pytest.mark.parametrize(
    ("until", "name"), [*(("block", n) for n in INTERRUPTED), *(("end", n) for n in ENDED)]
)
def test_damage_is_named_and_costs_its_step(
    until: str, name: str, how: str, tmp_path: Path
) -> None:
    run_of_three_steps(tmp_path, computed := [], until)
    want = [n for n in ["first", "block 0", "block 1", "last"] if n not in computed]
    damage(tmp_path / name, how)
    again = run_of_three_steps(tmp_path, computed := [])
    cost = INTERRUPTED[name] if until == "block" else ENDED[name]
    assert computed == sorted({*want, *cost}, key=["first", "block 0", "block 1", "last"].index)
    (sentence,) = again.damage
    named = name.removeprefix("journal/")
    assert sentence.startswith(f"{named} is damaged or missing: ")
    files = [p.read_text() for p in sorted((tmp_path / "blocks").iterdir())]
    assert files == ["block 1", "block 2"]
    # Nothing is computed again, and the damage is not forgotten, if the run is started once more.
    if cost or want:
        last = run_of_three_steps(tmp_path, computed := [])
        assert not computed and last.damage == again.damage


def test_every_bit_of_an_index_counts(tmp_path: Path) -> None:
    Journal(tmp_path, FINGERPRINT, Sink()).step(lambda: 1)
    data = (tmp_path / "journal.json").read_bytes()
    for at in range(0, len(data), 5):
        for bit in (1, 32):
            flipped = bytearray(data)
            flipped[at] ^= bit
            (tmp_path / "journal.json").write_bytes(flipped)
            content, damaged = read_index(tmp_path)
            assert content and content["steps"] and damaged == ["journal.json"]


def test_a_run_without_index_starts_over_and_says_so(tmp_path: Path) -> None:
    Journal(tmp_path, FINGERPRINT, Sink()).step(lambda: 1)
    for name in ("journal.json", "journal.copy.json"):
        damage(tmp_path / name, "one bit")
    again = Journal(tmp_path, FINGERPRINT, Sink())
    assert again.finished == 0 and again.step(lambda: 2) == 2
    assert again.damage == [
        f"journal{part}.json is damaged or missing: the run starts over" for part in ("", ".copy")
    ]


def test_a_failed_write_leaves_the_index_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, FINGERPRINT, Sink())
    journal.step(lambda: "first")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("os.replace", fail)
        with pytest.raises(OSError, match="No space"):
            journal.step(lambda: "second")
    again = Journal(tmp_path, FINGERPRINT, Sink())
    assert again.step(never) == "first" and again.step(lambda: "new") == "new"
    index = json.loads((tmp_path / "journal.json").read_text())["content"]
    assert [step[0] for step in index["steps"]] == ["000.msgpack", "001.msgpack"]


@pytest.mark.parametrize("killed", ["journal.copy.json.new", "journal.copy.json"])
def test_a_run_killed_in_its_first_write_starts_over(killed: str, tmp_path: Path) -> None:
    """Nothing was finished yet, so nothing is damaged."""
    Journal(tmp_path, FINGERPRINT, Sink())
    (tmp_path / "journal.json").unlink()
    (tmp_path / "journal.copy.json").rename(tmp_path / killed)
    again = Journal(tmp_path, FINGERPRINT, Sink())
    assert again.finished == 0 and not again.damage


def test_a_value_that_another_run_computed_is_reused(tmp_path: Path) -> None:
    cache = StepCache()
    assert_same(
        Journal(tmp_path / "a", FINGERPRINT, Sink(), cache, "model").step(lambda: VALUE, "key"),
        VALUE,
    )
    assert_same(
        Journal(tmp_path / "b", FINGERPRINT, Sink(), cache, "model").step(never, "key"), VALUE
    )
    assert cache.reused == 1
    # It is also on disk for the run that reused it.
    assert_same(Journal(tmp_path / "b", FINGERPRINT, Sink()).step(never), VALUE)


@pytest.mark.parametrize(
    ("context", "key"), [("another model", "key"), ("model", "another key"), ("model", None)]
)
def test_a_value_with_other_dependencies_is_computed(
    context: str, key: str | None, tmp_path: Path
) -> None:
    cache = StepCache()
    for k, run in enumerate(("a", "b")):
        Journal(tmp_path / run, FINGERPRINT, Sink(), cache, "model").step(
            lambda k=k: k, None if key is None else "key"
        )
    assert Journal(tmp_path / "c", FINGERPRINT, Sink(), cache, context).step(lambda: 7, key) == 7


def test_a_step_read_from_disk_is_reused_by_other_runs(tmp_path: Path) -> None:
    Journal(tmp_path / "a", FINGERPRINT, Sink()).step(lambda: VALUE)
    cache = StepCache()
    assert_same(Journal(tmp_path / "a", FINGERPRINT, Sink(), cache).step(never, "key"), VALUE)
    assert_same(Journal(tmp_path / "b", FINGERPRINT, Sink(), cache).step(never, "key"), VALUE)


def test_a_pass_that_another_run_finished_is_reused(tmp_path: Path) -> None:
    """The reuse also holds for a run that was interrupted inside the pass."""
    cache = StepCache()
    Journal(tmp_path / "a", FINGERPRINT, Sink(), cache).complete([1, 2, 3], "pass")
    cut = Journal(tmp_path / "b", FINGERPRINT, Sink())
    cut.reach(1, [1], [jnp.ones(2)])
    resumed = Journal(tmp_path / "b", FINGERPRINT, Sink(), cache)
    assert resumed.begin([jax.ShapeDtypeStruct((2,), np.float32)], "pass") == ([1, 2, 3], None)
    resumed.complete([1, 2, 3], "pass")
    assert Journal(tmp_path / "b", FINGERPRINT, Sink()).begin([]) == ([1, 2, 3], None)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == FILES


def test_small_values_of_the_cache_outlive_large_ones() -> None:
    """What every trial reads must not be pushed out by the statistics of one."""
    large = np.zeros(SMALL, np.uint8)
    cache = StepCache(limit=3 * SMALL)
    cache.keep("dense", {"perplexity": 30.0})
    for k in range(4):
        cache.keep(k, [large, large[:10]])
    assert cache.get("dense") == {"perplexity": 30.0}
    assert [k for k in range(4) if cache.get(k) is not None] == [2, 3]


def test_the_cache_keeps_no_more_than_its_limit() -> None:
    cache = StepCache(limit=100)
    for name in "abc":
        cache.keep(name, {"x": np.zeros(10, np.float32)})
    assert cache.get("a") is None and cache.get("b") is not None and cache.get("c") is not None
    cache.keep("d", np.zeros(26, np.float32))
    # The last value alone is beyond the limit.
    assert [name for name in "abcd" if cache.get(name) is not None] == ["b", "c"]


def test_digests_differ_by_numbers_shape_and_type() -> None:
    a = np.arange(6, dtype=np.int32)
    others = [a[::-1], a.reshape(2, 3), a.astype(np.int64), a[:5]]
    assert len({digest(x) for x in [a, *others]}) == 5 and digest(a.copy()) == digest(a)
