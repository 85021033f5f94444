"""Save the finished steps of a run, so that the same run started again continues behind them.

A run is a sequence of steps in a fixed order: a measurement, a phase of a search, a pass over the
blocks. The journal writes a step's value when the step is done. A pass can also be interrupted
between two blocks: the journal then holds the records so far and the hidden states at that point.

`journal.json` names every file that counts. It is replaced atomically after those files are
written, so a run killed at any instant leaves one of two consistent states.
"""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from calibration.step_cache import StepCache
from models.errors import InputError, damaged
from models.processes import barrier, run_on_primary
from models.programs import DeviceArray
from models.sharding import to_host

INDEX = "journal.json"
UNFINISHED = "{}.new"  # name of a file while it is being written
# Most of the time that saving hidden states may take; a kill loses ten times the last save at most.
SAVE_TIME_FRACTION = 0.1
LONGEST_SHOWN = 60  # characters of a fingerprint's value that an error message still shows


class DurableSink(Protocol):
    """A sink of finished blocks that can return to an earlier point."""

    def mark(self) -> Any:
        """Make all blocks so far durable, and return a JSON-able mark of where they end."""
        ...

    def rewind(self, mark: Any) -> None:
        """Drop everything behind a mark.

        Args:
          mark: A value that `mark` returned.

        Raises:
          InputError: The files differ from those at the mark.
        """
        ...


class ResumePoint(NamedTuple):
    """Point at which a pass over the blocks continues.

    Attributes:
      records: One record for each finished block.
      states: Hidden states behind the last finished block, one array a micro-batch; None if no
        block is finished or if all are.
    """

    records: list[Any]
    states: list[jax.Array | np.ndarray] | None


class _PartialPass(NamedTuple):
    """Names of the files of an interrupted pass."""

    records: str
    states: str | None  # None if the pass keeps no hidden states

    def files(self) -> list[str]:
        """Return the names of the files that exist."""
        return [self.records] if self.states is None else [self.records, self.states]


def write_durably(path: pathlib.Path, data: bytes) -> None:
    """Write a file so that it is complete or absent, even after a crash of the machine."""
    temporary = path.with_name(UNFINISHED.format(path.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before the rename: a rename may reach the disk ahead of the data
    os.replace(temporary, path)


def to_serialisable(value: Any) -> Any:
    """Return a value as it would come back from a file: arrays on the host, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): to_serialisable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_serialisable(v) for v in value]
    return to_host(value) if isinstance(value, jax.Array | DeviceArray) else value


def _pack(value: Any) -> bytes:
    """Serialise a value."""
    from flax.serialization import msgpack_serialize

    return msgpack_serialize({"value": value})


def _unpack(path: pathlib.Path) -> Any:
    """Read the value that `_pack` wrote."""
    from flax.serialization import msgpack_restore

    return msgpack_restore(path.read_bytes())["value"]


def _size(path: pathlib.Path) -> int:
    """Return the bytes of a file, or of all files of a directory; -1 if neither exists."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else -1


class Journal:
    """Finished steps of one run, in a directory of their own.

    Args:
      directory: The journal's directory; made if it does not exist.
      fingerprint: All settings and files that the result depends on, by a name that users know.
      sink: The sink of finished blocks; rewound to the end of the last finished step.
      cache: A cache that other runs of this process share.
      context: What all cached values of this run depend on besides their own key.

    Raises:
      InputError: The directory belongs to a run with another fingerprint, or a file is missing or
        damaged.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        fingerprint: Mapping[str, Any],
        sink: DurableSink,
        cache: StepCache | None = None,
        context: Hashable = None,
    ) -> None:
        self._directory = directory
        self._sink = sink
        self._cache = cache or StepCache(0)
        self._context = context
        self._fingerprint = json.loads(json.dumps(fingerprint))  # as the index file will have it
        self._position = 0  # index of the next step
        self._steps: list[str] = []  # files of the finished steps
        self._partial: _PartialPass | None = None
        self._last_save = time.monotonic()
        self._save_seconds = 0.0  # that the last save of hidden states took
        # One process reads the file, so that all continue from the same point.
        index = run_on_primary(self._read_index)
        if index is None:
            self._commit([], None)
        else:
            self._restore(index)

    def _read_index(self) -> dict[str, Any] | None:
        """Read the index file; return None if no index was ever written."""
        self._directory.mkdir(parents=True, exist_ok=True)
        # A run killed in its first write leaves only an unfinished index: nothing is lost.
        if all(path.name == UNFINISHED.format(INDEX) for path in self._directory.iterdir()):
            return None
        try:
            return dict(json.loads((self._directory / INDEX).read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):
            raise damaged(self._directory / INDEX) from None

    def _restore(self, index: Mapping[str, Any]) -> None:
        """Continue from an index, after checking that it is of this run and its files are whole."""
        try:
            before, sizes, mark = index["fingerprint"], index["sizes"], index["sink"]
            self._steps = index["steps"]
            self._partial = _PartialPass(**index["walk"]) if index["walk"] else None
        except (KeyError, TypeError):
            raise damaged(self._directory / INDEX) from None
        now = self._fingerprint
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            changes = ", ".join(_describe_change(name, before, now) for name in changed)
            raise InputError(
                f"an unfinished run in {self._directory} had another {changes}",
                "repeat its command to continue it, or start over with `noresume`",
            )
        for name, size in sizes.items():
            if _size(self._directory / name) != size:
                raise damaged(self._directory / name)
        self._sink.rewind(mark)

    @property
    def finished(self) -> int:
        """Return the number of finished steps; an interrupted pass counts as one."""
        return len(self._steps) + (self._partial is not None)

    def step(self, compute: Callable[[], Any], key: Hashable = None) -> Any:
        """Return the value of the next step: read it, take it from the cache, or compute it.

        A value consists of dicts with text keys, lists, numbers, text, None and arrays. It comes
        back as `to_serialisable` returns it.

        Args:
          compute: Computes the value; called only if no run has done so before.
          key: All that the value depends on besides the journal's `context`; None if no other run
            can use it.

        Returns:
          The value, which is on disk from here on.
        """
        if self._position < len(self._steps):
            value = _unpack(self._directory / self._steps[self._position])
        else:
            cached = self._cached(key)
            # Converted here, so that this run continues with the value that a resumed one reads.
            value = to_serialisable(compute()) if cached is None else cached
            self._write_step(value)
        self._end_step(key, value)
        return value

    def begin(
        self, states: Sequence[jax.ShapeDtypeStruct | np.ndarray], key: Hashable = None
    ) -> ResumePoint:
        """Begin the next step, a pass over the blocks, and return where it continues.

        Args:
          states: The pass's hidden states [b t d], one a micro-batch: shapes, types and placements
            of those on devices, arrays of those on the host; none if the pass keeps no states.
          key: As for `step`.

        Returns:
          The records of the finished blocks, and the hidden states behind the last of them.
        """
        if self._position < len(self._steps):
            return ResumePoint(_unpack(self._directory / self._steps[self._position]), None)
        cached = self._cached(key)
        if cached is not None:
            return ResumePoint(list(cached), None)
        if self._partial is None:
            return ResumePoint([], None)
        records = _unpack(self._directory / self._partial.records)
        if self._partial.states is None:
            return ResumePoint(records, [])
        from orbax.checkpoint import StandardCheckpointer

        path = self._directory.absolute() / self._partial.states
        with StandardCheckpointer() as checkpointer:
            return ResumePoint(records, checkpointer.restore(path, list(states)))

    def reach(
        self, blocks: int, records: Sequence[Any], states: Sequence[jax.Array | np.ndarray]
    ) -> None:
        """Save the state of the pass behind a block, unless saves take too much of the time.

        Args:
          blocks: Number of finished blocks.
          records: Their records.
          states: Hidden states [b t d] behind the last of them, one a micro-batch; may be empty.
        """
        start = time.monotonic()
        wait = self._save_seconds / SAVE_TIME_FRACTION
        # All processes must save together, so the clock of one decides.
        if not run_on_primary(lambda: blocks == 1 or start - self._last_save >= wait):
            return
        name = f"{self._position:03d}-{blocks:03d}"

        def write_records() -> None:
            # Of a run that was killed while it saved: the checkpointer refuses to overwrite.
            shutil.rmtree(self._directory / name, ignore_errors=True)
            write_durably(self._directory / f"{name}.msgpack", _pack(list(records)))

        run_on_primary(write_records)
        if states:
            from orbax.checkpoint import StandardCheckpointer

            with StandardCheckpointer() as checkpointer:
                checkpointer.save(self._directory.absolute() / name, list(states))
        self._commit(self._steps, _PartialPass(f"{name}.msgpack", name if states else None))
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - start

    def complete(self, records: Sequence[Any], key: Hashable = None) -> None:
        """End the pass over the blocks and save its records.

        Args:
          records: One record for each block.
          key: As for `step`.
        """
        if self._position == len(self._steps):
            self._write_step(list(records))
        self._end_step(key, list(records))

    def _cached(self, key: Hashable) -> Any:
        """Return the cached value of a key, or None."""
        return None if key is None else self._cache.get((self._context, key))

    def _end_step(self, key: Hashable, value: Any) -> None:
        """Keep the value for other runs and move on to the next step."""
        if key is not None:
            self._cache.keep((self._context, key), value)
        self._position += 1

    def _write_step(self, value: Any) -> None:
        """Write the value of the next step and count the step as finished."""
        name = f"{self._position:03d}.msgpack"
        run_on_primary(lambda: write_durably(self._directory / name, _pack(value)))
        self._commit([*self._steps, name], None)

    def _commit(self, steps: list[str], partial: _PartialPass | None) -> None:
        """Make the steps and the partial pass count from here on."""
        # The sink first: an index must never name blocks that are not on disk.
        mark = self._sink.mark()
        # Writing the index removes files that another process may still be reading.
        barrier("commit")
        run_on_primary(lambda: self._write_index(steps, partial, mark))
        self._steps = steps
        self._partial = partial

    def _write_index(self, steps: list[str], partial: _PartialPass | None, mark: Any) -> None:
        """Replace the index file, then remove every file that no longer counts."""
        used = [*steps, *(partial.files() if partial else [])]
        index = {
            "fingerprint": self._fingerprint,
            "steps": steps,
            "walk": partial._asdict() if partial else None,
            "sink": mark,
            "sizes": {name: _size(self._directory / name) for name in used},
        }
        write_durably(self._directory / INDEX, json.dumps(index).encode())
        # Only now: until the index was replaced, the files of the one before still counted.
        for path in self._directory.iterdir():
            if path.name not in (*used, INDEX):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _describe_change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a setting's name, with its two values if these are short enough to read."""
    old, new = json.dumps(before.get(name)), json.dumps(now.get(name))
    return f"{name} ({old}, now {new})" if max(len(old), len(new)) < LONGEST_SHOWN else name
