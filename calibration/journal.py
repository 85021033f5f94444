"""Durable steps: what a run has finished is on disk, and the same run started again goes on behind it.

A run is a sequence of steps in a fixed order: a measurement, a phase of a search, a walk over the blocks. A step's value is written when
it is done; a walk is also interruptible between blocks, by its hidden states at that point. `journal.json` names all files that count and
is replaced in one stroke after they are written, so whatever instant a run is killed at, one of two consistent states is there.
"""

import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from models.errors import InputError, damaged
from models.processes import barrier, run_on_primary
from models.programs import DeviceArray
from models.sharding import to_host

INDEX = "journal.json"
NEW = "{}.new"  # the name of a file that is being written
SHARE = (
    0.1  # of the time that may go into saving hidden states: the rest is what a kill costs at most
)


class Sink(Protocol):
    """Where finished blocks go. `mark` makes what was put so far durable and says where it ended, JSON-able; `rewind` goes back there,
    with InputError where the files are not as they were."""

    def mark(self) -> Any: ...
    def rewind(self, mark: Any) -> None: ...


class StepCache:
    """What steps gave, for other runs of this process that would compute the same: by all that it depends on. No run's values differ by it.

    Args:
      limit: bytes of arrays that are kept; the oldest values make room.
    """

    def __init__(self, limit: int = 1 << 30):
        self._limit, self._values = limit, {}  # type: int, dict[Hashable, tuple[Any, int]]
        self.reused = 0  # how many values were

    def get(self, key: Hashable) -> Any:
        """The value of that key, or None."""
        found, _ = self._values.get(key, (None, 0))
        self.reused += found is not None
        return found

    def keep(self, key: Hashable, value: Any) -> None:
        """Remember a value, which nobody may change from here on."""
        size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(value))
        if size > self._limit:
            return
        self._values[key] = value, size
        while sum(size for _, size in self._values.values()) > self._limit:
            del self._values[next(iter(self._values))]

    def of(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of that key, computed where it is not remembered."""
        value = self.get(key)
        if value is None:
            value = compute()
            self.keep(key, value)
        return value


class ResumePoint(NamedTuple):
    """Where a walk stands: a record for each finished block, and the hidden states behind the last of them; None where none is."""

    records: list[Any]
    states: list[jax.Array | np.ndarray] | None


def write_durably(path: pathlib.Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a crash of the machine."""
    beside = path.with_name(NEW.format(path.name))
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def to_serialisable(value: Any) -> Any:
    """A value with its arrays on the host and its tuples as lists: as it comes back from a file."""
    if isinstance(value, Mapping):
        return {str(k): to_serialisable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_serialisable(v) for v in value]
    return to_host(value) if isinstance(value, jax.Array | DeviceArray) else value


def _pack(value: Any) -> bytes:
    from flax.serialization import msgpack_serialize

    return msgpack_serialize({"value": value})


def _unpack(path: pathlib.Path) -> Any:
    from flax.serialization import msgpack_restore

    return msgpack_restore(path.read_bytes())["value"]


def _size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files of a directory; -1 where nothing is."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else -1


class Journal:
    """The steps of one run, in a directory of their own.

    Args:
      fingerprint: all that the result depends on, by a name for people: a run with another one is refused.
      sink: rewound to the last step that was finished.
      memory: where steps that have a key are looked up and kept, together with `common`.
      common: what else their values depend on.
    Raises InputError for another fingerprint, named, and for files that are damaged or gone.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        fingerprint: Mapping[str, Any],
        sink: Sink,
        memory: StepCache | None = None,
        common: Hashable = None,
    ):
        self._directory, self._sink, self._memory, self._common = (
            directory,
            sink,
            memory or StepCache(0),
            common,
        )
        self._step, self._steps, self._walk = 0, [], None  # type: tuple[int, list[str], dict[str, Any] | None]
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._saved, self._cost = time.monotonic(), 0.0
        index = run_on_primary(self._index)
        if index is None:
            self._commit([], None)
        else:
            self._open(index)

    def _index(self) -> dict[str, Any] | None:
        """What the index file says; None where none was ever written: the directory is new, or its run was killed in the first write."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if all(path.name == NEW.format(INDEX) for path in self._directory.iterdir()):
            return None
        try:
            return dict(json.loads((self._directory / INDEX).read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):
            raise damaged(self._directory / INDEX) from None

    def _open(self, index: Mapping[str, Any]) -> None:
        try:
            was, sizes = index["fingerprint"], index["sizes"]
            self._steps, self._walk = index["steps"], index["walk"]
            mark = index["sink"]
        except (KeyError, TypeError):
            raise damaged(self._directory / INDEX) from None
        changed = [
            k for k in {**was, **self._fingerprint} if was.get(k) != self._fingerprint.get(k)
        ]
        if changed:
            raise InputError(
                f"an unfinished run in {self._directory} had another {', '.join(_told(k, was, self._fingerprint) for k in changed)}: "
                "repeat its command to go on, or begin anew with --noresume"
            )
        for name, size in sizes.items():
            if _size(self._directory / name) != size:
                raise damaged(self._directory / name)
        self._sink.rewind(mark)

    @property
    def finished(self) -> int:
        """How many steps are, an interrupted walk counted in."""
        return len(self._steps) + (self._walk is not None)

    def step(self, compute: Callable[[], Any], key: Hashable = None) -> Any:
        """The value of the next step: read if it was finished before, else remembered of another run or computed, and written.

        It consists of dicts with text for keys, lists, numbers, text, None and arrays, and comes back so (`to_serialisable`).

        Args:
          key: all that the value depends on, but for what the run's `common` says; None: only this run can use it.
        """
        if self._step < len(self._steps):
            value = _unpack(self._directory / self._steps[self._step])
        else:
            known = self._known(key)
            value = to_serialisable(compute()) if known is None else known
            self._finish(value)
        self._over(key, value)
        return value

    def _known(self, key: Hashable) -> Any:
        return None if key is None else self._memory.get((self._common, key))

    def _over(self, key: Hashable, value: Any) -> None:
        if key is not None:
            self._memory.keep((self._common, key), value)
        self._step += 1

    def _finish(self, value: Any) -> None:
        name = f"{self._step:03d}.msgpack"
        run_on_primary(lambda: write_durably(self._directory / name, _pack(value)))
        self._commit([*self._steps, name], None)

    def _commit(self, steps: list[str], walk: dict[str, Any] | None) -> None:
        mark = self._sink.mark()
        barrier("commit")  # whatever the others still read is not removed before they have
        run_on_primary(lambda: self._write_index(steps, walk, mark))
        self._steps, self._walk = steps, walk

    def _write_index(self, steps: list[str], walk: dict[str, Any] | None, mark: Any) -> None:
        used = (
            [*steps, *(name for name in (walk["records"], walk["states"]) if name)]
            if walk
            else steps
        )
        sizes = {name: _size(self._directory / name) for name in used}
        index = {
            "fingerprint": self._fingerprint,
            "steps": steps,
            "walk": walk,
            "sink": mark,
            "sizes": sizes,
        }
        write_durably(self._directory / INDEX, json.dumps(index).encode())
        for path in self._directory.iterdir():
            if path.name not in (*used, INDEX):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def begin(
        self, states: Sequence[jax.ShapeDtypeStruct | np.ndarray], key: Hashable = None
    ) -> ResumePoint:
        """Where the next step, a walk, stands.

        Args:
          states: what its hidden states are like: shapes, types and placements of those on devices, arrays of those on the host.
          key: as `step` has it.
        """
        if self._step < len(self._steps):
            return ResumePoint(_unpack(self._directory / self._steps[self._step]), None)
        if (known := self._known(key)) is not None:
            return ResumePoint(list(known), None)
        if not self._walk:
            return ResumePoint([], None)
        records = _unpack(self._directory / self._walk["records"])
        if not states:
            return ResumePoint(records, [])
        from orbax.checkpoint import StandardCheckpointer

        with StandardCheckpointer() as checkpointer:
            return ResumePoint(
                records,
                checkpointer.restore(
                    self._directory.absolute() / self._walk["states"], list(states)
                ),
            )

    def reach(
        self, blocks: int, records: Sequence[Any], states: Sequence[jax.Array | np.ndarray]
    ) -> None:
        """Say that the walk has finished so many blocks. It is saved if saving does not cost more than `SHARE` of the time."""
        now = time.monotonic()
        if not run_on_primary(lambda: blocks == 1 or now - self._saved >= self._cost / SHARE):
            return
        name = f"{self._step:03d}-{blocks:03d}"

        def begin() -> None:
            shutil.rmtree(
                self._directory / name, ignore_errors=True
            )  # of a run that was killed while it saved
            write_durably(self._directory / f"{name}.msgpack", _pack(list(records)))

        run_on_primary(begin)
        if states:
            from orbax.checkpoint import StandardCheckpointer

            with StandardCheckpointer() as checkpointer:
                checkpointer.save(self._directory.absolute() / name, list(states))
        self._commit(
            self._steps, {"records": f"{name}.msgpack", "states": name if states else None}
        )
        self._saved = time.monotonic()
        self._cost = self._saved - now

    def complete(self, records: Sequence[Any], key: Hashable = None) -> None:
        """Say that the walk is over; `key` as `step` has it."""
        if self._step == len(self._steps):
            self._finish(list(records))
        self._over(key, list(records))


def _told(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A name with its two values, where these are short enough to tell people something."""
    a, b = (json.dumps(x.get(name)) for x in (was, now))
    return f"{name} ({a}, now {b})" if max(len(a), len(b)) < 60 else name


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's numbers, shape and type: what stands for tokens in a key."""
    return hashlib.sha256(
        f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()
    ).hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
