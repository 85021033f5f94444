"""Train a whole pruned model until its logits meet those of the dense one."""

import dataclasses
from typing import Any

import jax
import numpy as np

from calibration.runtime import Runtime
from models.arch import Model, NonBlockParams
from models.checkpoint.blocks import prefetch
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import planner
from models.sharding import place
from pruning.figures import Figure, LineSeries
from pruning.recovery import distill_steps as programs
from pruning.recovery.distill_data import Windows, batch_order, split_windows
from pruning.recovery.distill_steps import Setup
from pruning.recovery.distill_teacher import KeptTeacher, LiveTeacher, Targets
from pruning.recovery.distill_training import End, Settings, Trainer
from pruning.recovery.types import Recovered, RecoveryInputs, check_limits
from pruning.recovery.zeros import check_zeros
from pruning.types import BlockSink

# Defaults of `lr`, which gave the lowest divergence: of 1e-4 and 3e-4, and of 3e-4 to 3e-3.
RATES = {"full": 1e-4, "lora": 1e-3}


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
        check_limits("distill", self, limits)

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
        if planner():  # has no text: windows that share none stand for it
            ids = np.arange(ids.size).reshape(ids.shape)
        windows = split_windows(ids, self.batch, self.held_out, inputs.seed)
        order = batch_order(len(windows.train), self.steps, inputs.seed)
        targets = self._targets(inputs, windows, order, runtime)
        settings = Settings(
            self.steps,
            self.rate,
            self.temperature,
            self.lora,
            self.accumulate,
            self.decay,
            self.checkpoint_minutes,
        )
        trainer = Trainer(settings, inputs, windows, order, targets, runtime)
        end, setup = trainer.train(), trainer.setup
        del targets, trainer  # both models, before blocks are read again
        zeros, non_block = _write(inputs, runtime, sink, setup, end)
        record = end.record
        details = {
            "lr": self.rate,
            "steps": record["step"],
            "best": record["best"],
            "curve": record["curve"],
            "teacher_cross_entropy": record["teacher_cross_entropy"],
            "held_out_windows": windows.held_out.shape[0] * self.batch,
            "windows_dropped": windows.dropped,
            "zeros": zeros,
        }
        return Recovered(
            tokens=record["step"] * windows.train[0].size,
            details=details,
            figures=_figures(record),
            warnings=end.warnings,
            notes=_notes(self.steps, record, windows),
            non_block=non_block,
        )

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


def _write(
    inputs: RecoveryInputs, runtime: Runtime, sink: BlockSink, setup: Setup, end: End
) -> tuple[int, NonBlockParams | None]:
    """Give the blocks to the sink; return the zeros, and what is new outside the blocks."""
    pruned, mesh = inputs.pruned, runtime.mesh
    trained = None if end.best is None else jax.tree.unflatten(setup.structure, end.best)
    zeros = 0
    for j, old in enumerate(prefetch(pruned.blocks, None, mesh)):
        new = old
        if trained is not None:
            new = programs.stored(pruned.arch, setup.lora, mesh, trained.blocks[j], old)
        zeros += check_zeros(new, old)
        sink(j, new)
    if trained is None or setup.lora:
        return zeros, None
    before = place(pruned.non_block, mesh)
    non_block = programs.stored(pruned.arch, 0, mesh, trained.non_block, before)
    check_zeros(non_block, before)
    return zeros, non_block


def _notes(steps: int, record: dict[str, Any], windows: Windows) -> tuple[str, ...]:
    """Return sentences that a reader may want to know."""
    notes = []
    done, best, fresh = record["step"], record["best"], len(windows.train)
    if not best:
        notes.append("the training got no better on held-out windows: the model stays as it was")
    elif done < steps:
        notes.append(f"the training ended after {done} of {steps} steps, the best was {best}")
    if done > fresh:
        notes.append(f"the source has text for {fresh} steps: it was read {done / fresh:.1f} times")
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
