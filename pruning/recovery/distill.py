"""Train a whole pruned model until its logits meet those of the dense one."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from calibration.runtime import Runtime
from models.arch import Model
from models.checkpoint.blocks import prefetch
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.sharding import place, to_host
from pruning.figures import Figure, LineSeries
from pruning.recovery import distill_steps as programs
from pruning.recovery.blocks_core import Training, learning_rates
from pruning.recovery.distill_checkpoints import Checkpoints, Point
from pruning.recovery.distill_data import Windows, batch_order, split_windows
from pruning.recovery.distill_steps import Params, Setup
from pruning.recovery.distill_teacher import KeptTeacher, LiveTeacher, Targets, sharded
from pruning.recovery.types import Recovered, RecoveryInputs
from pruning.recovery.zeros import check_zeros
from pruning.types import BlockSink

EVALUATIONS = 10  # times that the held-out windows are looked at
PATIENCE = 3  # of these without a better one end the training
RATES = {"full": 1e-4, "lora": 1e-3}  # defaults of `lr`; docs/distillation.md has the sweep


@dataclasses.dataclass(frozen=True)
class Distill:
    """Distill the dense model's logits into the pruned one: AdamW on all that survives.

    Zeros stay zeros and shapes stay. Windows come from the calibration's source, and some of them
    are held out: the step that is best on these is kept, so the model never ends worse on them than
    it began.

    Args:
      steps: Updates.
      lr: Largest learning rate; it rises over the first tenth of the steps and falls to zero. None:
        1e-4, with adapters 1e-3.
      batch: Windows of an update.
      temperature: Temperature of both models' distributions.
      lora: Rank of low-rank adapters of the linears, which are trained alone and merged at the end
        under the mask; 0 to train all parameters.
      top_k: Tokens of the teacher's distribution that are kept, in files, before the training; all
        others count as one. 0: the teacher runs at every step, and all tokens count.
      accumulate: Parts of a batch that are in memory one after the other.
      held_out: Windows that no update sees; at most a quarter of all.
      decay: Decoupled weight decay of the matrices.
      checkpoint_minutes: Time between two checkpoints of the training.

    Raises:
      InputError: A number is out of range.

    Source: Hinton et al. 2015; Muralidharan et al. 2024 ("Minitron"), section 3.
    """

    steps: int = 200
    lr: float | None = None
    batch: int = 2
    temperature: float = 1.0
    lora: int = 0
    top_k: int = 0
    accumulate: int = 1
    held_out: int = 16
    decay: float = 0.0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        limits = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (self.lr is None or self.lr > 0, "above 0"),
            "batch": (self.batch >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "lora": (self.lora >= 0, "0 or above"),
            "top_k": (self.top_k >= 0, "0 or above"),
            "accumulate": (
                self.accumulate >= 1 and self.batch % self.accumulate == 0,
                f"a divisor of batch={self.batch}",
            ),
            "held_out": (self.held_out >= 1, "at least 1"),
            "decay": (self.decay >= 0, "0 or above"),
            "checkpoint_minutes": (self.checkpoint_minutes >= 0, "0 or above"),
        }
        for name, (holds, limit) in limits.items():
            if not holds:
                raise InputError(f"distill: {name}={getattr(self, name)} must be {limit}")

    @property
    def rate(self) -> float:
        """Return the largest learning rate."""
        return self.lr if self.lr is not None else RATES["lora" if self.lora else "full"]

    def check(self, dense: Model, change: ShapeChange, windows: int) -> None:
        """Raise InputError for what cannot be distilled, as `Recovery.check` says."""
        vocabulary = dense.non_block.embed.shape[0]
        if self.top_k > vocabulary:
            raise InputError(
                f"distill: top_k={self.top_k} is more than the {vocabulary} tokens of the model"
            )

    def run(self, inputs: RecoveryInputs, runtime: Runtime, sink: BlockSink) -> Recovered:
        """Train the whole model, as `Recovery.run` says."""
        ids = inputs.draw(self.steps * self.batch + self.held_out)
        windows = split_windows(ids, self.batch, self.held_out, inputs.seed)
        order = batch_order(len(windows.train), self.steps, inputs.seed)
        targets = self._targets(inputs, windows, order, runtime)
        trainer = _Trainer(self, inputs, windows, order, targets, runtime)
        end = trainer.train()
        del targets  # the dense model, before blocks are read again
        return _finish(self, inputs, runtime, sink, trainer.setup, end, windows)

    def _targets(
        self, inputs: RecoveryInputs, windows: Windows, order: np.ndarray, runtime: Runtime
    ) -> Targets:
        """Return the teacher's targets of all batches, the held-out ones first."""
        batches = np.concatenate([windows.held_out, windows.train])
        if not self.top_k:
            return LiveTeacher(inputs.dense, batches, runtime)
        held_out = len(windows.held_out)
        needed = [*range(held_out), *sorted({held_out + int(i) for i in order})]
        return KeptTeacher(
            inputs.dense, batches, needed, self.top_k, self.temperature, inputs.directory, runtime
        )


class _End(NamedTuple):
    """A finished training: the best masters, None for those it began with, and its record."""

    best: list[jax.Array] | None
    record: dict[str, Any]
    warnings: tuple[str, ...]


class _Trainer:
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
        settings: Distill,
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
        dtype = str(np.dtype(student.non_block.embed.dtype))
        params = sharded(student, runtime)
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

    def train(self) -> _End:
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
            advance(note=f"loss {loss:.4f}")
        warnings = ()
        if self._checkpoints.damaged:
            warnings = ("the checkpoint of the training was damaged: it started over",)
        return _End(best if record["best"] else None, record, warnings)

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

    def _held_out(self, measure: Any) -> Any:
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


def _finish(
    settings: Distill,
    inputs: RecoveryInputs,
    runtime: Runtime,
    sink: BlockSink,
    setup: Setup,
    end: _End,
    windows: Windows,
) -> Recovered:
    """Give the recovered blocks to the sink, and return what the report says."""
    pruned, mesh = inputs.pruned, runtime.mesh
    trained = None if end.best is None else jax.tree.unflatten(setup.structure, end.best)
    zeros = 0
    for j, old in enumerate(prefetch(pruned.blocks, None, mesh)):
        new = old
        if trained is not None:
            new = programs.stored(pruned.arch, setup.lora, mesh, trained.blocks[j], old)
        zeros += check_zeros(new, old)
        sink(j, new)
    non_block = None
    if trained is not None and not settings.lora:
        old = place(pruned.non_block, mesh)
        non_block = programs.stored(pruned.arch, 0, mesh, trained.non_block, old)
        zeros += check_zeros(non_block, old)
    record = end.record
    details = {
        "lr": settings.rate,
        "steps": record["step"],
        "best": record["best"],
        "curve": record["curve"],
        "teacher_cross_entropy": record["teacher_cross_entropy"],
        "held_out_windows": windows.held_out.shape[0] * windows.held_out.shape[1],
        "windows_dropped": windows.dropped,
        "zeros": zeros,
    }
    return Recovered(
        tokens=record["step"] * windows.train[0].size,
        details=details,
        figures=_figures(record),
        warnings=end.warnings,
        notes=_notes(settings, record, windows),
        non_block=non_block,
    )


def _notes(settings: Distill, record: dict[str, Any], windows: Windows) -> tuple[str, ...]:
    """Return sentences that a reader may want to know."""
    notes = []
    if not record["best"]:
        notes.append("the training got no better on held-out windows: the model stays as it was")
    elif record["step"] < settings.steps:
        notes.append(f"the training ended after {record['step']} steps, the best was {record['best']}")
    rounds = record["step"] / len(windows.train)
    if rounds > 1:
        notes.append(f"the source has text for {len(windows.train)} steps: it was read {rounds:.1f} times")
    return tuple(notes)


def _figures(record: dict[str, Any]) -> tuple[Figure, ...]:
    """Return the curves of the training."""
    curve, teacher = record["curve"], record["teacher_cross_entropy"]
    x = [point["step"] for point in curve]
    losses = LineSeries(
        title="Divergence from the dense model while distilling",
        x_label="step",
        y_label="nats a token",
        series={
            "train": [point["train"] for point in curve],
            "held out": [point["held_out"] for point in curve],
        },
        x=x,
        caption="Forward KL times the temperature's square; train: mean since the point before.",
        marked={"held out": [x.index(record["best"])]},
    )
    surprise = LineSeries(
        title="Cross-entropy of held-out windows while distilling",
        x_label="step",
        y_label="nats a token",
        series={"held out": [point["cross_entropy"] for point in curve]},
        x=x,
        caption="Dashed: that of the dense model.",
        level=teacher,
    )
    return losses, surprise
