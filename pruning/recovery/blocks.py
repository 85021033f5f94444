"""Train each block of a pruned model until its output meets that of the dense block."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from calibration.passes import BlockResult, micro_batches, overflow, visit_blocks
from calibration.runtime import Runtime
from calibration.states import States
from models.arch import Block, Model, embed
from models.checkpoint.blocks import prefetch
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import planner
from models.sharding import place, to_host
from pruning.figures import LineSeries
from pruning.recovery import block_steps as steps_of
from pruning.recovery.adamw_core import learning_rates
from pruning.recovery.block_steps import Objective
from pruning.recovery.blocks_core import Loss
from pruning.recovery.types import Recovered, RecoveryInputs, check_limits
from pruning.recovery.zeros import check_zeros
from pruning.structured.depth_streams import (
    advance_dense,
    advance_pruned,
    copy_dense,
    halves,
    run_all,
)
from pruning.types import BlockSink

EVALUATIONS = 6  # times that the held-out windows are looked at while a block is trained
PATIENCE = 2  # of these without a better one show that the learning rate is too large
BACK_OFF = 0.25  # what it is then multiplied with
NEGLIGIBLE = 1e-6  # error that is not worth a training: before the first cut of a shallower model
# Share of the held-out error that a block must lose to be changed, times the root of the number of
# held-out windows. Less is chance, and many such changes made FLAP's models worse.
LEAST_GAIN = 0.04
LOGITS_RATE = 1 / 3  # of the learning rate, where the logits behind the last block are compared
HELD_OUT, MOST_HELD_OUT = 0.25, 16  # share of the windows, and how many at most, by default


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Reconstruct block by block: AdamW on what survives, towards the dense block's outputs.

    Zeros stay zeros and shapes stay. A share of the windows is held out: the step that is best on
    it is kept, the learning rate falls where it was too large, and a block that hardly gains on
    it stays as it was. The block before removed blocks answers for the dense state behind them, the
    last block for the dense logits.

    Args:
      unit: "block": a whole block at once; "half": its attention first, then the rest.
      inputs: "pruned": a block sees the outputs of the recovered blocks before it, as it will when
        the model runs; "dense": those of the dense blocks.
      steps: Updates of each block, or of each half.
      lr: Largest learning rate; it rises over the first tenth of the steps and falls to zero.
      batch: Windows of an update.
      loss: Of all blocks but the last. "token": squared error of each token's state, relative to
        itself and the squares of the dense state, so at most 1; "mse": squared error of all tokens
        relative to all squares, where few massive states decide; "cosine": angle of each token's
        state.
      hold_out: Share of the windows that no update sees. None: a quarter, at most 16 windows.
      decay: Decoupled weight decay of the matrices.

    Raises:
      InputError: A number is out of range.

    Source: Guo et al. 2024 (EBFT); arXiv 2510.14444.
    """

    unit: Literal["block", "half"] = "block"
    inputs: Literal["pruned", "dense"] = "pruned"
    steps: int = 48
    lr: float = 3e-3
    batch: int = 2
    loss: Loss = "token"
    hold_out: float | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (self.lr > 0, "above 0"),
            "batch": (self.batch >= 1, "at least 1"),
            "hold_out": (self.hold_out is None or 0 < self.hold_out < 1, "between 0 and 1"),
            "decay": (self.decay >= 0, "0 or above"),
        }
        check_limits("blocks", self, limits)

    def _held_out(self, windows: int) -> int:
        """Return the number of micro-batches that are held out, the last ones."""
        count = math.ceil(windows / self.batch)
        if self.hold_out is None:
            wanted = min(HELD_OUT * count, MOST_HELD_OUT / self.batch)
        else:
            wanted = self.hold_out * count
        # At least one on each side. A last, smaller micro-batch is always held out.
        return min(max(1, round(wanted)), count - 1)

    def check(self, dense: Model, change: ShapeChange, windows: int) -> None:
        """Raise InputError for what cannot be reconstructed, as `Recovery.check` says."""
        if change.hidden:
            raise InputError(
                "blocks compares hidden states, and the pruned model has fewer channels in them",
                "use distill, which compares logits",
                field="recover",
            )
        if windows <= self.batch:
            raise InputError(
                f"leaves blocks(batch={self.batch}) no windows to hold out",
                f"give at least {self.batch + 1}",
                field="calibration_samples",
                value=windows,
            )

    def run(self, inputs: RecoveryInputs, runtime: Runtime, sink: BlockSink) -> Recovered:
        """Train block by block, as `Recovery.run` says."""
        # In any order: neighbours may be of one text, and a mixture has its sources in order.
        order = np.random.default_rng(inputs.seed).permutation(len(inputs.windows))
        held_out = self._held_out(len(order))
        # Windows that no update would use need not go through the models.
        unused = max(0, math.ceil(len(order) / self.batch) - held_out - self.steps)
        windows = inputs.windows[order[unused * self.batch :]]
        trainer = _Trainer(self, inputs, windows, held_out, runtime, sink)
        records = visit_blocks(
            inputs.dense,
            np.repeat(windows, 2, axis=0),  # of the dense and of the pruned model
            dataclasses.replace(runtime, batch=2 * self.batch),
            trainer.visit,
            name="recovering blocks",
        )
        notes = []
        if unused:
            notes.append(
                f"{len(windows)} of {len(order)} calibration windows were used: "
                f"steps={self.steps + unused} would use all of them"
            )
        return _result([record for record in records if record], notes)


class _Trainer:
    """A visitor of the dense blocks that trains the pruned ones.

    Args:
      settings: How to train.
      inputs: What to recover, and from what.
      windows: Calibration windows in the order they are used, int [samples length].
      held_out: Number of micro-batches that no update sees, the last ones.
      runtime: How to execute.
      sink: Takes the finished blocks in order.
    """

    def __init__(
        self,
        settings: Blocks,
        inputs: RecoveryInputs,
        windows: np.ndarray,
        held_out: int,
        runtime: Runtime,
        sink: BlockSink,
    ) -> None:
        self._settings, self._inputs, self._windows = settings, inputs, windows
        self._held_out, self._runtime, self._sink = held_out, runtime, sink
        self._index = {original: j for j, original in enumerate(inputs.kept_blocks)}

    def visit(self, i: int, dense: Block, xs: States, last: bool) -> BlockResult:
        """Train the pruned block that dense block i became.

        Args:
          i: Index of the dense block.
          dense: The dense block.
          xs: States of both models, by micro-batch.
          last: Whether it is the last dense block.
        """
        pruned_model, mesh = self._inputs.pruned, self._runtime.mesh
        if i == 0:
            self._embed_pruned(xs)
        if i not in self._index:
            # A block before it has gone over those that were removed, unless there is none.
            if i < self._inputs.kept_blocks[0]:
                run_all(advance_dense, self._inputs.dense.arch, dense, xs)
            return BlockResult(dense, None, propagated=True)
        j = self._index[i]
        pruned = next(prefetch(pruned_model.blocks, [j], mesh))
        new, record = self._train(i, dense, pruned, xs)
        record["zeros"] = check_zeros(new, pruned)
        self._sink(j, new)
        if j + 1 < len(pruned_model.blocks):
            if self._settings.inputs == "dense":
                for k, x in enumerate(xs):
                    xs[k] = copy_dense(x)
            else:
                run_all(advance_pruned, pruned_model.arch, new, xs)
        return BlockResult(dense, record, propagated=True)

    def _embed_pruned(self, xs: States) -> None:
        """Replace the pruned model's states by those that its own embedding gives."""
        model, mesh = self._inputs.pruned, self._runtime.mesh
        non_block = place(model.non_block, mesh)
        batches = micro_batches(self._windows, self._settings.batch, mesh)
        for k, tokens in enumerate(batches):
            xs[k] = steps_of.with_pruned(xs[k], embed(model.arch, non_block, tokens))

    def _end(self, i: int) -> int:
        """Return the dense block whose input should equal the output of the block kept as i."""
        j, kept = self._index[i], self._inputs.kept_blocks
        return kept[j + 1] if j + 1 < len(kept) else len(self._inputs.dense.blocks)

    def _train(
        self, i: int, dense: Block, block: Block, xs: States
    ) -> tuple[Block, dict[str, Any]]:
        """Return the trained block and its record; the dense states are moved on."""
        arch, loss, came = self._inputs.pruned.arch, self._settings.loss, block
        record: dict[str, Any] = {"block": i}
        trained = (True,) * len(jax.tree.leaves(block))
        if self._settings.unit == "half":
            end = arch.group("heads").reader.name
            x = jax.eval_shape(lambda x: halves(x)[1], xs[0])
            attention = steps_of.leaves_behind(arch.block, end, block, x)
            objective = Objective(arch.block, loss, end, arch.branch_scale, arch.outputs_add)
            block, record["attention"] = self._fit(i, objective, attention, [block], dense, xs)
            trained = tuple(not t for t in attention)
        of_dense = self._inputs.dense.arch
        run_all(advance_dense, of_dense, dense, xs)
        removed = range(i + 1, self._end(i))
        for other in prefetch(self._inputs.dense.blocks, removed, self._runtime.mesh):
            run_all(advance_dense, of_dense, other, xs)
        objective, reference = Objective(arch.block, loss), None
        if self._index[i] + 1 == len(self._inputs.pruned.blocks):
            # Nothing behind it can make good what the states' errors do to the logits.
            objective = objective._replace(heads=(of_dense.head, arch.head))
            models = (self._inputs.dense, self._inputs.pruned)
            reference = tuple(place(m.non_block, self._runtime.mesh) for m in models)
        # A better attention may still give a worse output, so the block as it came is tried too.
        tried = [block] if block is came else [came, block]
        block, record["output"] = self._fit(i, objective, trained, tried, reference, xs)
        return block, record

    def _fit(
        self,
        i: int,
        objective: Objective,
        trained: tuple[bool, ...],
        tried: Sequence[Block],
        reference: Any,
        xs: States,
    ) -> tuple[Block, dict[str, Any]]:
        """Train some leaves of a block.

        Args:
          i: Index of the dense block.
          objective: What is compared.
          trained: Whether each leaf is trained, in order.
          tried: Blocks that are there before the training, which begins with the last.
          reference: What the objective compares with, as `block_steps.step` has it.
          xs: States of both models, by micro-batch.

        Returns:
          The best block on the held-out windows of all that were measured, the one that came where
        it is hardly better, and the figures.
        """
        settings, block = self._settings, tried[-1]
        train = len(xs) - self._held_out
        rate = settings.lr * (LOGITS_RATE if objective.heads else 1.0)
        rates = learning_rates(rate, settings.steps)
        rng = np.random.default_rng([self._inputs.seed, i])
        measure = functools.partial(_measure, objective, reference, xs, range(train, len(xs)))
        step = functools.partial(steps_of.step, objective, trained)
        curve = [measure(candidate) for candidate in tried]
        if not math.isfinite(curve[0]):
            raise overflow(i)
        best_at, every = int(np.nanargmin(curve)), math.ceil(settings.steps / EVALUATIONS)
        best = tried[best_at]
        state = steps_of.begin(trained, block)
        order: list[int] = []
        done = tokens = unsuccessful = 0
        while done < settings.steps and curve[best_at] > NEGLIGIBLE:
            order = order or rng.permutation(train).tolist()
            x = xs[order.pop()]
            tokens += x.shape[0] // 2 * x.shape[1]
            decay = np.float32(settings.decay)
            state = step(state, block, reference, x, rates[done], decay)
            done += 1
            if done % every and done < settings.steps:
                continue
            candidate = steps_of.stored(trained, block, state.masters)
            curve.append(measure(candidate))
            # A comparison with NaN is False, so a training that overflows backs off.
            if curve[-1] < curve[best_at]:
                best, best_at, unsuccessful = candidate, len(curve) - 1, 0
            else:
                unsuccessful += 1
            if unsuccessful == PATIENCE or planner():  # a plan: the most that may happen
                del state  # as large as three blocks in float32, and so is the next
                state, unsuccessful = steps_of.begin(trained, best), 0
                rates = rates * np.float32(BACK_OFF)
        windows = self._held_out * settings.batch
        if curve[best_at] > (1 - LEAST_GAIN / math.sqrt(windows)) * curve[0]:
            best, best_at = tried[0], 0
        figures = {"held_out": curve, "best": best_at, "steps": done, "tokens": tokens}
        return best, figures


def _measure(
    objective: Objective, reference: Any, xs: States, held_out: Sequence[int], block: Block
) -> float:
    """Return the loss of a block on the held-out micro-batches."""
    sums: Any = np.zeros(2, np.float32)
    for k in held_out:
        sums = steps_of.add_held_out(objective, block, reference, xs[k], sums)
    return float(to_host(steps_of.loss_of(sums)))


def _result(records: Sequence[dict[str, Any]], notes: Sequence[str]) -> Recovered:
    """Return what the report says.

    Args:
      records: Of each block that was trained.
      notes: Sentences about the windows.
    """
    fits = [
        record[part] for record in records for part in ("attention", "output") if part in record
    ]
    outputs = [record["output"] for record in records]
    before = [fit["held_out"][0] for fit in outputs]
    after = [fit["held_out"][fit["best"]] for fit in outputs]
    figure = LineSeries(
        title="Error of each block's output on held-out windows",
        x_label="block of the dense model",
        y_label="error",
        series={"before": before, "recovered": after},
        x=[record["block"] for record in records],
        caption="Relative to the dense model's states; the last block's is the divergence of its "
        "logits. Each block starts from recovered inputs.",
    )
    same = sum(fit["best"] == 0 for fit in outputs)
    stay = f"{same} of {len(outputs)} blocks gained too little and stay as they were"
    return Recovered(
        tokens=sum(fit["tokens"] for fit in fits),
        details={"blocks": list(records), "zeros": sum(record["zeros"] for record in records)},
        figures=(figure,),
        notes=(*notes, stay) if same else tuple(notes),
    )
