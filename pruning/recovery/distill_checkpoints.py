"""Checkpoints of a training, so that a process that was killed goes on where the last one is."""

import json
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import jax

from calibration.digests import stored_digest
from calibration.journal_files import write_durably
from models.processes import barrier, run_on_primary
from models.programs import planner

INDEX = "training.json"


class Point(NamedTuple):
    """A training between two steps.

    Attributes:
      arrays: Masters and moments, and the best masters so far: a pytree of arrays.
      record: All else, JSON-able; its "step" counts the steps that are done.
    """

    arrays: Any
    record: dict[str, Any]


class Checkpoints:
    """Orbax checkpoints of a training in a directory, of which the last one counts.

    An index names it with its digest. The index is replaced after the checkpoint is complete, and
    the one before is removed after that, so one of them is always whole.

    Args:
      directory: The directory; made with the first checkpoint.
      minutes: Time between two checkpoints.
    """

    def __init__(self, directory: pathlib.Path, minutes: float) -> None:
        self._directory, self._seconds = directory.absolute(), 60 * minutes
        self._last = time.monotonic()
        self.damaged = False  # whether a checkpoint was there that could not be used
        self.skipped = 0  # checkpoints that the disk had no room for
        self.full = False  # whether it had none the last time

    def restore(self, like: Point) -> Point | None:
        """Return the last checkpoint; None without one.

        Args:
          like: A training whose arrays have the same shapes, types and placements.
        """
        index = None if planner() else run_on_primary(self._index)
        if index is None:
            return None
        from orbax.checkpoint import StandardCheckpointer

        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like.arrays
        )
        with StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(self._directory / index["name"], shapes)
        return Point(arrays, index["record"])

    def _index(self) -> dict[str, Any] | None:
        """Return the index; None if there is none, or if its checkpoint is damaged."""
        path = self._directory / INDEX
        if not path.is_file():
            return None
        try:
            index: dict[str, Any] = json.loads(path.read_bytes())
            intact = stored_digest(self._directory / index["name"]) == index["sha256"]
        except (ValueError, KeyError, TypeError):
            intact = False
        self.damaged = not intact
        return index if intact else None

    def save_if_due(self, point: Point) -> None:
        """Save a training if the last checkpoint is old enough and the disk has room for another.

        All processes must call this.

        Args:
          point: The training.
        """
        # The clock of one process decides, as all must save together.
        if planner() or not run_on_primary(lambda: time.monotonic() - self._last >= self._seconds):
            return
        # Orbax fails on a full disk with pages of tracebacks, and takes the training with it.
        self.full = not run_on_primary(lambda: self._has_room(point.arrays))
        if self.full:
            self.skipped += 1
            self._last = time.monotonic()
            return
        from orbax.checkpoint import StandardCheckpointer

        name = f"training-{point.record['step']:07d}"
        path = self._directory / name
        # Of a process that was killed before it wrote the index; Orbax does not overwrite.
        run_on_primary(lambda: shutil.rmtree(path, ignore_errors=True))
        with StandardCheckpointer() as checkpointer:
            checkpointer.save(path, point.arrays)
        barrier("training saved")
        run_on_primary(lambda: self._commit(name, point.record))
        self._last = time.monotonic()

    def _has_room(self, arrays: Any) -> bool:
        """Return whether the disk has room for a checkpoint beside the one before."""
        self._directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._directory).free
        return bool(free > sum(x.nbytes for x in jax.tree.leaves(arrays)))

    def _commit(self, name: str, record: dict[str, Any]) -> None:
        """Let a checkpoint count, and remove those before it."""
        index = {"name": name, "sha256": stored_digest(self._directory / name), "record": record}
        write_durably(self._directory / INDEX, json.dumps(index).encode())
        for other in self._directory.glob("training-*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)
