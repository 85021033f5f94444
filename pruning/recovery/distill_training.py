"""The training of a distillation: steps, held-out losses, and checkpoints on the way."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from calibration.runtime import Runtime
from models.sharding import to_host
from pruning.recovery import distill_steps as programs
from pruning.recovery.adamw_core import Training, learning_rates
from pruning.recovery.distill_checkpoints import Checkpoints, Point
from pruning.recovery.distill_data import Windows
from pruning.recovery.distill_steps import Batch, Params, Setup
from pruning.recovery.distill_teacher import Targets, sharded, type_of
from pruning.recovery.types import RecoveryInputs

EVALUATIONS = 10  # times that the held-out windows are looked at
# Of these without a better one end the training. Half of them, as the loss falls most when the
# learning rate does, towards the end.
PATIENCE = 5


class Settings(NamedTuple):
    """How to train, as `Distill` has it.

    Attributes:
      steps: Updates.
      rate: Largest learning rate.
      temperature: Temperature of both models' distributions.
      lora: Rank of the adapters; 0 without.
      accumulate: Parts of a batch.
      decay: Weight decay.
      checkpoint_minutes: Time between two checkpoints.
    """

    steps: int
    rate: float
    temperature: float
    lora: int
    accumulate: int
    decay: float
    checkpoint_minutes: float


class End(NamedTuple):
    """A finished training.

    Attributes:
      best: The best masters in the type that is stored; None for those that it began with.
      record: Its "step", "best" step, "curve" and "teacher_cross_entropy".
      warnings: Sentences that the report's reader must see.
    """

    best: list[jax.Array] | None
    record: dict[str, Any]
    warnings: tuple[str, ...]


class Trainer:
    """The training of a whole model.

    Args:
      settings: How to train.
      inputs: What to recover, and from what.
      windows: Windows in batches.
      order: Training batch of every step.
      targets: The teacher's targets of all batches, the held-out ones first.
      runtime: How to execute.
    """

    def __init__(
        self,
        settings: Settings,
        inputs: RecoveryInputs,
        windows: Windows,
        order: np.ndarray,
        targets: Targets,
        runtime: Runtime,
    ) -> None:
        self._settings, self._windows, self._order = settings, windows, order
        self._targets, self._runtime = targets, runtime
        # Kept, as they are looked at again and again.
        self._held_batches = [targets.batch(i) for i in range(len(windows.held_out))]
        self._checkpoints = Checkpoints(inputs.directory, settings.checkpoint_minutes)
        student, mesh = inputs.pruned, runtime.mesh
        dtype = type_of(student)
        params = sharded(student, runtime, dtype if settings.lora else "float32")
        nothing = Params(None, (None,) * len(params.blocks))
        if settings.lora:
            seed = np.int32(inputs.seed)
            adapters = tuple(
                programs.begin_adapters(student.arch, settings.lora, mesh, block, seed, np.int32(i))
                for i, block in enumerate(params.blocks)
            )
            trained, self._base = nothing._replace(blocks=adapters), params
        else:
            trained, self._base = params, nothing
        masters, structure = jax.tree.flatten(trained)
        self._state: Training = programs.begin(mesh, masters)
        self.setup = Setup(
            student.arch,
            inputs.dense.arch,
            structure,
            dtype,
            settings.lora,
            settings.temperature,
            settings.accumulate,
            mesh,
        )

    def train(self) -> End:
        """Train to the end, and return the best masters."""
        settings, runtime = self._settings, self._runtime
        best, record = self._begin()
        rates = learning_rates(settings.rate, settings.steps)
        every = math.ceil(settings.steps / EVALUATIONS)
        size = self._windows.train[0].size
        advance = runtime.progress(
            "distilling",
            settings.steps,
            unit="steps",
            tokens=settings.steps * size,
            done=record["step"],
        )
        while record["step"] < settings.steps and record["since_best"] < PATIENCE:
            done = record["step"]
            loss = self._step(int(self._order[done]), rates[done])
            record["step"] = done = done + 1
            record["losses"].append(loss)
            if done % every == 0 or done == settings.steps:
                best = self._evaluate(best, record)
            self._checkpoints.save_if_due(Point((self._state, best), record))
            room = ", no room for a checkpoint" if self._checkpoints.full else ""
            advance(note=f"loss {loss:.4f}{room}")
        return End(best if record["best"] else None, record, self._warnings())

    def _warnings(self) -> tuple[str, ...]:
        """Return what went wrong with the checkpoints."""
        warnings = []
        if self._checkpoints.damaged:
            warnings.append("the checkpoint of the training was damaged: it started over")
        if self._checkpoints.skipped:
            warnings.append(
                "the disk had no room for checkpoints of the training "
                f"({self._checkpoints.skipped} left out); a killed run would have lost their steps"
            )
        return tuple(warnings)

    def _begin(self) -> tuple[list[jax.Array], dict[str, Any]]:
        """Return the best masters and the record of the last checkpoint, or of the beginning."""
        best = self._copy()
        restored = self._checkpoints.restore(Point((self._state, best), {}))
        if restored is not None:
            self._state, best = restored.arrays
            return best, restored.record
        record = {"step": 0, "best": 0, "since_best": 0, "losses": [], "curve": []}
        teacher = self._held_out(self._targets.cross_entropy)
        record["teacher_cross_entropy"] = float(teacher) / self._predicted
        return self._evaluate(best, record), record

    def _copy(self) -> list[jax.Array]:
        """Return a copy of the masters in the type that they are stored in."""
        dtype = "float32" if self.setup.lora else self.setup.dtype
        copy: list[jax.Array] = programs.copied(dtype, self._state.masters)
        return copy

    def _step(self, batch: int, rate: np.float32) -> float:
        """Take one step on a training batch, and return its loss."""
        targets = self._targets
        self._state, loss = programs.step(
            self.setup,
            self._state,
            self._base,
            targets.non_block,
            targets.batch(len(self._windows.held_out) + batch),
            rate,
            np.float32(self._settings.decay),
        )
        return float(to_host(loss))

    @property
    def _predicted(self) -> int:
        """Return the number of predicted positions of the held-out windows."""
        batches, b, t = self._windows.held_out.shape
        return batches * b * (t - 1)

    def _held_out(self, measure: Callable[[int, Batch], Any]) -> Any:
        """Return the sum of (index, batch) -> numbers over the held-out batches, float64."""
        batches = enumerate(self._held_batches)
        return sum(np.asarray(measure(i, batch), np.float64) for i, batch in batches)

    def _evaluate(self, best: list[jax.Array], record: dict[str, Any]) -> list[jax.Array]:
        """Note the held-out losses, and return the masters that are best by now."""
        setup, state = self.setup, self._state
        divergence, surprise = self._held_out(
            lambda _, batch: to_host(
                programs.held_out(setup, state.masters, self._base, self._targets.non_block, batch)
            )
        )
        curve = record["curve"]
        since = curve[-1]["step"] if curve else 0
        losses = record["losses"][since:]
        point = {
            "step": record["step"],
            "train": float(np.mean(losses)) if losses else None,
            "held_out": float(divergence) / self._windows.held_out.size,
            "cross_entropy": float(surprise) / self._predicted,
        }
        curve.append(point)
        if not curve[1:]:
            return best
        # A comparison with NaN is False, so a training that overflows ends.
        lowest = next(p["held_out"] for p in curve if p["step"] == record["best"])
        if point["held_out"] < lowest:
            record |= {"best": record["step"], "since_best": 0}
            return self._copy()
        record["since_best"] += 1
        return best
