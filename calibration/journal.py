"""Save the finished steps of a run, so that the same run started again continues behind them.

A run is a sequence of steps in a fixed order: a measurement, a phase of a search, a pass over the
blocks. The journal writes a step's value when the step is done. A pass can also be interrupted
between two blocks: the journal then holds the records so far and the hidden states at that point.

The index names every file that counts, with its SHA-256. It is replaced atomically after those
files are written, so a run killed at any instant leaves one of two consistent states. A step whose
files have changed meanwhile is computed again.
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

from calibration.digests import stored_digest
from calibration.journal_files import (
    COPY,
    INDEX,
    Step,
    changed_files,
    pack_value,
    read_index,
    unpack_value,
    write_durably,
    write_index,
)
from calibration.step_cache import StepCache
from models.errors import InputError
from models.processes import barrier, run_on_primary
from models.programs import DeviceArray
from models.sharding import to_host

# Most of the time that saving hidden states may take; a kill loses ten times the last save at most.
SAVE_TIME_FRACTION = 0.1
LONGEST_SHOWN = 60  # characters of a fingerprint's value that an error message still shows


class DurableSink(Protocol):
    """A sink of finished blocks that can return to an earlier point."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks so far."""
        ...

    @property
    def files(self) -> Sequence[pathlib.Path]:
        """Return the files of the blocks that are durable; none of them changes any more."""
        ...

    def mark(self) -> Any:
        """Make all blocks so far durable, and return a JSON-able mark of where they end."""
        ...

    def rewind(self, mark: Any) -> None:
        """Drop everything behind a mark.

        Args:
          mark: A value that `mark` returned; None for the beginning.
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


def to_serialisable(value: Any) -> Any:
    """Return a value as it would come back from a file: arrays on the host, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): to_serialisable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_serialisable(v) for v in value]
    return to_host(value) if isinstance(value, jax.Array | DeviceArray) else value


class Journal:
    """Finished steps of one run, in a directory of their own.

    Args:
      directory: The journal's directory; made if it does not exist.
      fingerprint: All settings and files that the result depends on, by a name that users know.
      sink: The sink of finished blocks; rewound to the end of the last finished step.
      cache: A cache that other runs of this process share.
      context: What all cached values of this run depend on besides their own key.

    Attributes:
      damage: Sentences about files that were damaged or missing, at this start or an earlier one.

    Raises:
      InputError: The directory belongs to a run with another fingerprint.
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
        self._steps: list[Step | None] = []  # None for a step whose files were damaged
        self._digests: dict[str, str] = {}  # SHA-256 of the files that count, by their keys
        self._blocks_before = 0  # blocks of the sink when the step in hand began
        self._last_save = time.monotonic()
        self._save_seconds = 0.0  # that the last save of hidden states took
        # One process reads the file, so that all continue from the same point.
        index, damaged = run_on_primary(lambda: read_index(directory))
        effect = "its copy is used" if index else "the run starts over"
        self.damage = [f"{name} is damaged or missing: {effect}" for name in damaged]
        if index is None:
            self._commit([])
        else:
            self._restore(index)

    def _key(self, path: pathlib.Path) -> str:
        """Return the path of a sink's file as the index has it, relative to the journal."""
        return os.path.relpath(path, self._directory)

    def _restore(self, index: Mapping[str, Any]) -> None:
        """Continue from an index of this run with the steps whose files are unchanged."""
        before, now = index["fingerprint"], self._fingerprint
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            changes = ", ".join(_describe_change(name, before, now) for name in changed)
            raise InputError(
                f"an unfinished run in {self._directory} had another {changes}",
                "repeat its command to continue it, or start over with `noresume`",
            )
        digests = index["sha256"]
        damaged = set(run_on_primary(lambda: changed_files(self._directory, digests)))
        self._digests = {key: value for key, value in digests.items() if key not in damaged}
        effect = "is damaged or missing: its step is computed again"
        self.damage += index["damage"]
        self.damage += [f"{key.removeprefix('../')} {effect}" for key in sorted(damaged)]
        self._sink.rewind(index["sink"])
        steps = [None if step is None else Step(*step) for step in index["steps"]]
        blocks = {self._key(path) for path in self._sink.files}
        if damaged & blocks or any(s and s.puts and damaged & set(s.files()) for s in steps):
            # Blocks are put in order, so all of them are put again.
            self._sink.rewind(None)
            self._digests = {k: v for k, v in self._digests.items() if k not in blocks}
            steps = [None if step is None or step.puts else step for step in steps]
        self._steps = [None if s is None or damaged & set(s.files()) else s for s in steps]

    @property
    def finished(self) -> int:
        """Return the number of finished steps; an interrupted pass counts as one."""
        return sum(step is not None for step in self._steps)

    def _saved(self) -> Step | None:
        """Return the step in hand as the journal has it, or None."""
        return self._steps[self._position] if self._position < len(self._steps) else None

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
        saved = self._saved()
        if saved:
            value = unpack_value(self._directory / saved.value)
        else:
            self._blocks_before = self._sink.blocks
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
        saved = self._saved()
        if saved and saved.finished:
            return ResumePoint(unpack_value(self._directory / saved.value), None)
        self._blocks_before = self._sink.blocks
        cached = self._cached(key)
        if cached is not None:
            return ResumePoint(list(cached), None)
        if saved is None:
            return ResumePoint([], None)
        records = unpack_value(self._directory / saved.value)
        if saved.states is None:
            return ResumePoint(records, [])
        from orbax.checkpoint import StandardCheckpointer

        path = self._directory.absolute() / saved.states
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
            write_durably(self._directory / f"{name}.msgpack", pack_value(list(records)))

        run_on_primary(write_records)
        if states:
            from orbax.checkpoint import StandardCheckpointer

            with StandardCheckpointer() as checkpointer:
                checkpointer.save(self._directory.absolute() / name, list(states))
        self._replace(Step(f"{name}.msgpack", name if states else None, False, self._has_put()))
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - start

    def complete(self, records: Sequence[Any], key: Hashable = None) -> None:
        """End the pass over the blocks and save its records.

        Args:
          records: One record for each block.
          key: As for `step`.
        """
        saved = self._saved()
        if saved is None or not saved.finished:
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

    def _has_put(self) -> bool:
        """Return whether the step in hand has given blocks to the sink, at an earlier start too."""
        saved = self._saved()
        return self._sink.blocks > self._blocks_before or bool(saved and saved.puts)

    def _write_step(self, value: Any) -> None:
        """Write the value of the step in hand and count the step as finished."""
        name = f"{self._position:03d}.msgpack"
        run_on_primary(lambda: write_durably(self._directory / name, pack_value(value)))
        self._replace(Step(name, None, True, self._has_put()))

    def _replace(self, step: Step) -> None:
        """Let the files of the step in hand, just written, count from here on."""
        for name in step.files():
            self._digests.pop(name, None)
        # A step that was damaged has finished ones behind it.
        self._commit([*self._steps[: self._position], step, *self._steps[self._position + 1 :]])

    def _commit(self, steps: list[Step | None]) -> None:
        """Make the steps count from here on."""
        # The sink first: an index must never name blocks that are not on disk.
        mark = self._sink.mark()
        # Writing the index removes files that another process may still be reading.
        barrier("commit")
        run_on_primary(lambda: self._write_index(steps, mark))
        self._steps = steps

    def _write_index(self, steps: Sequence[Step | None], mark: Any) -> None:
        """Replace the index file, then remove every file that no longer counts."""
        used = {name for step in steps if step for name in step.files()}
        # A file that counted before is not read again: it does not change.
        self._digests = {
            key: self._digests.get(key) or stored_digest(self._directory / key)
            for key in [*sorted(used), *map(self._key, self._sink.files)]
        }
        index = {
            "fingerprint": self._fingerprint,
            "steps": steps,
            "sink": mark,
            "sha256": self._digests,
            "damage": self.damage,
        }
        write_index(self._directory, index)
        # Only now: until the index was replaced, the files of the one before still counted.
        for path in self._directory.iterdir():
            if path.name not in (*used, INDEX, COPY):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _describe_change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a setting's name, with its two values if these are short enough to read."""
    old, new = json.dumps(before.get(name)), json.dumps(now.get(name))
    return f"{name} ({old}, now {new})" if max(len(old), len(new)) < LONGEST_SHOWN else name
