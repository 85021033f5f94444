"""Targets of a distillation: the teacher's states as it runs, or its likeliest tokens in files."""

import functools
import io
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from calibration.journal_files import write_durably
from calibration.runtime import Runtime
from models.arch import Model, NonBlockParams
from models.checkpoint.blocks import prefetch
from models.processes import barrier, run_on_primary
from models.programs import planner
from models.sharding import place, split, to_host
from pruning.recovery import distill_steps as programs
from pruning.recovery.distill_core import Likeliest
from pruning.recovery.distill_steps import Batch, Params


class Targets(Protocol):
    """Source of the teacher's targets."""

    @property
    def non_block(self) -> NonBlockParams | None:
        """Return the teacher's parameters outside the blocks; None if its tokens are kept."""

    def batch(self, i: int) -> Batch:
        """Return a batch with its targets, on the devices.

        Args:
          i: Index of the batch.
        """

    def cross_entropy(self, i: int, batch: Batch) -> float:
        """Return the sum of the teacher's cross-entropy over a batch, in nats.

        Args:
          i: Index of the batch.
          batch: The batch, as `batch` returned it.
        """


class LiveTeacher:
    """A teacher that runs for every batch; its parameters are fully sharded.

    Args:
      model: The dense model.
      batches: Windows, int32 [batches b t].
      runtime: How to execute.
    """

    def __init__(self, model: Model, batches: np.ndarray, runtime: Runtime) -> None:
        self._arch, self._mesh, self._batches = model.arch, runtime.mesh, batches
        self._params = sharded(model, runtime, type_of(model))

    @property
    def non_block(self) -> NonBlockParams:
        """Return the teacher's parameters outside the blocks."""
        non_block: NonBlockParams = self._params.non_block
        return non_block

    def batch(self, i: int) -> Batch:
        """Return a batch with the teacher's last states, as `Targets.batch` says."""
        tokens = split(self._batches[i], self._mesh, "sample")
        x = programs.teacher_states(self._arch, self._mesh, self._params, tokens)
        return Batch(tokens, x)

    def cross_entropy(self, i: int, batch: Batch) -> float:
        """Return the sum of the teacher's cross-entropy, as `Targets.cross_entropy` says."""
        tokens, x = batch
        total = programs.cross_entropy(self._arch, self._mesh, self.non_block, x, tokens)
        return float(to_host(total))

    def likeliest(self, batch: Batch, k: int, temperature: float) -> Likeliest:
        """Return the k likeliest tokens of the teacher at a temperature.

        Args:
          batch: A batch with the teacher's states.
          k: Number of tokens.
          temperature: The temperature.
        """
        found: Likeliest = programs.likeliest(
            self._arch, self._mesh, k, temperature, self.non_block, batch.target
        )
        return found


def type_of(model: Model) -> str:
    """Return the name of the type of a model's parameters."""
    return str(np.dtype(model.non_block.embed.dtype))


def sharded(model: Model, runtime: Runtime, dtype: str) -> Params:
    """Return the parameters of a whole model in a type, fully sharded.

    Args:
      model: The model, read one block at a time.
      runtime: How to execute.
      dtype: Name of the type.
    """
    mesh = runtime.mesh
    non_block = programs.shard(mesh, dtype, place(model.non_block, mesh))
    blocks = tuple(
        programs.shard(mesh, dtype, block) for block in prefetch(model.blocks, None, mesh)
    )
    return Params(non_block, blocks)


class KeptTeacher:
    """A teacher whose likeliest tokens lie in files, one for each batch.

    The files of an earlier process are used again.

    Args:
      model: The dense model; it is in memory only until the files are complete.
      batches: Windows, int32 [batches b t].
      needed: Indices of the batches that will be asked for.
      k: Number of tokens.
      temperature: Temperature of the distributions.
      directory: Directory of the files.
      runtime: How to execute.
    """

    def __init__(
        self,
        model: Model,
        batches: np.ndarray,
        needed: Sequence[int],
        k: int,
        temperature: float,
        directory: pathlib.Path,
        runtime: Runtime,
    ) -> None:
        self._batches, self._directory, self._mesh = batches, directory, runtime.mesh
        self._planned: Any = None
        missing = run_on_primary(lambda: [int(i) for i in needed if not self._readable(i)])
        if not missing:
            return
        teacher = LiveTeacher(model, batches, runtime)
        advance = runtime.progress(
            "teacher's likeliest tokens",
            len(needed),
            unit="batches",
            tokens=len(needed) * batches[0].size,
            done=len(needed) - len(missing),
        )
        for i in missing:
            batch = teacher.batch(i)
            found = teacher.likeliest(batch, k, temperature)
            surprise = teacher.cross_entropy(i, batch)
            ids, logs = to_host(found.ids), to_host(found.logs)
            if planner():
                self._planned = found
            else:
                run_on_primary(functools.partial(self._write, i, ids, logs, surprise))
            advance()
        barrier("teacher")

    def _path(self, i: int) -> pathlib.Path:
        return self._directory / f"teacher-{i:06d}.npz"

    def _read(self, i: int) -> Any:
        # Read first: NumPy leaves a damaged file open.
        with np.load(io.BytesIO(self._path(i).read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def _readable(self, i: int) -> bool:
        """Return whether the file of a batch is there and undamaged; the format has checksums."""
        if planner():
            return False
        try:
            self._read(i)
        except (OSError, ValueError, zipfile.BadZipFile):
            return False
        return True

    def _write(self, i: int, ids: np.ndarray, logs: np.ndarray, surprise: float) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        np.savez(file, ids=ids, logs=logs, surprise=surprise)
        write_durably(self._path(i), file.getvalue())

    @property
    def non_block(self) -> None:
        """Return None: the student needs the tokens alone."""

    def batch(self, i: int) -> Batch:
        """Return a batch with the teacher's likeliest tokens, as `Targets.batch` says."""
        tokens = split(self._batches[i], self._mesh, "sample")
        if planner():
            return Batch(tokens, self._planned)
        file = self._read(i)
        kept = Likeliest(file["ids"], file["logs"])
        return Batch(tokens, jax.tree.map(lambda x: split(x, self._mesh, "sample"), kept))

    def cross_entropy(self, i: int, batch: Batch) -> float:
        """Return the sum of the teacher's cross-entropy, as `Targets.cross_entropy` says."""
        return 1.0 if planner() else float(self._read(i)["surprise"])
