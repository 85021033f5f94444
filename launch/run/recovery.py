"""Recover a pruned checkpoint: every recovery of a chain starts from the checkpoint before it."""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from calibration.journal import Journal
from calibration.runtime import Runtime
from calibration.states import available_memory
from calibration.tokenizer import TextTokenizer
from eval.size import measure_size
from launch.flags.common import offload_for
from launch.flags.dtypes import stored_dtype
from launch.flags.recoveries import Call
from launch.report import console
from launch.report.progress import prefixed
from launch.run import export
from launch.run.formats import write_formats
from launch.run.job import Output
from launch.run.measure import read_calibration
from models.arch import Model
from models.checkpoint.output_format import ShapeChange
from models.checkpoint.reader import Checkpoint
from models.checkpoint.writer import Writer
from models.processes import run_on_primary
from models.stream import width_of
from pruning.budget import all_shapes
from pruning.figures import to_json
from pruning.recovery.types import Recovered, RecoveryInputs

DRAW = 7919  # added to the seed of windows that are drawn for a recovery


class Task(NamedTuple):
    """Everything that the recoveries of a run have in common.

    Attributes:
      chain: Recoveries in order, at least one.
      dense: The teacher.
      kept_blocks: Index in the teacher of each block of the pruned model.
      windows: Calibration windows, int [samples length].
      draw: Draws other windows, as `RecoveryInputs.draw` has it.
      seed: Seed of everything random.
      runtime: How to execute; its journal is not used.
      facts: Everything that the result depends on.
      work: Directory of the unfinished run.
      output: Form of the result.
      dtype: Name of the type to store.
    """

    chain: Sequence[Call]
    dense: Checkpoint
    kept_blocks: tuple[int, ...]
    windows: np.ndarray
    draw: Callable[[int], np.ndarray]
    seed: int
    runtime: Runtime
    facts: Mapping[str, Any]
    work: pathlib.Path
    output: Output
    dtype: str


class Result(NamedTuple):
    """A recovered checkpoint.

    Attributes:
      written: The checkpoint as it loads.
      parameters: Parameters that were written, padding not counted.
      records: Of each recovery: `recover`, `seconds`, `tokens`, `details`.
      figures: Plots and tables for the report.
      warnings: Sentences that the report's reader must see.
      notes: Sentences that a reader may want to know, and need not act on.
      zeros: Weights of the linears that are zero, "before" and "after".
    """

    written: export.Written
    parameters: int
    records: list[dict[str, Any]]
    figures: list[dict[str, Any]]
    warnings: list[str]
    notes: list[str]
    zeros: dict[str, int]


def check_chain(chain: Sequence[Call], dense: Model, change: ShapeChange, windows: int) -> None:
    """Check before any work that every recovery can be done.

    Args:
      chain: Recoveries in order.
      dense: The teacher.
      change: How the pruned model's shapes differ from the teacher's.
      windows: Number of calibration windows.

    Raises:
      InputError: One of them cannot.
    """
    for call in chain:
        call.recovery.check(dense, change, windows)


def least_bytes(chain: Sequence[Call], pruned: Checkpoint, dtype: str, output_format: str) -> int:
    """Return the bytes that recoveries write at least.

    Args:
      chain: Recoveries in order.
      pruned: The pruned checkpoint.
      dtype: Value of --dtype.
      output_format: Value of --output_format.
    """
    # Each recovery but the first reads the checkpoint of the one before.
    copies = 1 + (output_format == "orbax") + (len(chain) > 1)
    return pruned.parameters * jnp.dtype(stored_dtype(dtype, pruned)).itemsize * copies


def change_of(pruned: Checkpoint, dense: Checkpoint) -> ShapeChange:
    """Return how the shapes of a finished pruned model differ, as far as recoveries ask.

    Args:
      pruned: The pruned checkpoint.
      dense: The dense checkpoint.
    """
    width = width_of(pruned.model.non_block)
    narrower = width != width_of(dense.model.non_block)
    shallower = len(pruned.specs) != len(dense.specs)
    return ShapeChange(shallower=shallower, hidden=width if narrower else 0)


def with_room(runtime: Runtime, activations: str, model: Model, windows: np.ndarray) -> Runtime:
    """Return the runtime with a memory for the hidden states of both models.

    Args:
      runtime: How to execute.
      activations: Value of --activations.
      model: The dense model.
      windows: Calibration windows, int [samples length].
    """
    # Of the dense and of the pruned model.
    both = jax.ShapeDtypeStruct((2 * windows.shape[0], windows.shape[1]), windows.dtype)
    x = jax.eval_shape(model.arch.embed, shape_tree(model.non_block), both)
    offload = offload_for(activations, x, runtime.mesh, available_memory())
    return dataclasses.replace(runtime, offload=offload)


def recover_all(task: Task, pruned: Checkpoint, directory: pathlib.Path) -> Result:
    """Recover a checkpoint step by step, and write the result.

    A step that is finished, or interrupted, goes on from its own journal.

    Args:
      task: What to do.
      pruned: The pruned checkpoint.
      directory: Directory of the result.
    """
    records, figures, warnings, notes = [], [], [], []
    zeros = [_zeros(pruned)]
    start = pruned
    for k, call in enumerate(task.chain):
        console.note(f"recovering: {call.text}")
        began = time.monotonic()
        last = k + 1 == len(task.chain)
        place = directory if last else task.work / f"recovered-{k}"
        step = _recover(task, k, call, start, place)
        start = step.written.loaded
        result = step.result
        warnings += [*step.damage, *result.warnings]
        notes += [f"{call.text}: {note}" for note in result.notes]
        figures += [to_json(figure) for figure in result.figures]
        records.append(
            {
                "recover": call.text,
                "seconds": time.monotonic() - began,
                "tokens": result.tokens,
                "details": dict(result.details),
            }
        )
    zeros.append(_zeros(start))
    if zeros[1] < zeros[0]:
        raise AssertionError(f"recovery lost {zeros[0] - zeros[1]} zeros, which is a bug")
    if zeros[1] > zeros[0]:
        warnings.append(f"{zeros[1] - zeros[0]} more weights became zero in {task.dtype}")
    # What was removed of the dense model is the same.
    source = pruned.directory / export.RECORD
    run_on_primary(lambda: str(shutil.copy2(source, directory)))
    form = (task.output, step.written, step.check, task.runtime.mesh)
    written = step.written._replace(other_formats=write_formats(directory, *form))
    counts = {"before": zeros[0], "after": zeros[1]}
    return Result(written, step.parameters, records, figures, warnings, notes, counts)


class _Step(NamedTuple):
    """One finished recovery: its checkpoint, what it reports, and damaged files it found."""

    written: export.Written
    check: export.RoundTripCheck
    parameters: int
    result: Recovered
    damage: list[str]


def _recover(task: Task, k: int, call: Call, start: Checkpoint, directory: pathlib.Path) -> _Step:
    """Do the recovery of number k, and write its checkpoint."""
    work = task.work / f"recovery-{k}"
    if directory.is_relative_to(task.work):
        # Begun by a run that was killed; its blocks lie in `work`.
        run_on_primary(lambda: shutil.rmtree(directory, ignore_errors=True))
    layout = task.output.layout
    writer = Writer(directory, start.config, layout, work=work / "blocks", dtype=task.dtype)
    journal = Journal(work / "journal", {**task.facts, "recovery": [k, call.text]}, writer)
    for sentence in journal.damage:
        console.note(f"warning: unfinished run: {sentence}")
    check = export.RoundTripCheck(start.model, writer)
    progress = prefixed(task.runtime.progress, f"{call.text.partition('(')[0]}: ")
    inputs = RecoveryInputs(
        start.model,
        task.dense.model,
        task.kept_blocks,
        task.windows,
        task.draw,
        work / "state",
        task.seed,
    )
    runtime = dataclasses.replace(task.runtime, journal=journal, progress=progress)
    result = call.recovery.run(inputs, runtime, check.put)
    non_block = start.model.non_block
    if result.non_block is not None:
        non_block = result.non_block
        writer.mark()  # so that all blocks can be read back
        check.run_stored(non_block)
    form = writer.finish(non_block, start.directory, progress=progress)
    dtype = jnp.dtype(start.model.non_block.embed.dtype)
    size, by = writer.parameters, task.output.check
    written = export.load_back(directory, form, check, dtype, size, by, progress)
    run_on_primary(lambda: shutil.rmtree(inputs.directory, ignore_errors=True))
    damage = [f"unfinished run: {sentence}" for sentence in journal.damage]
    return _Step(written, check, writer.parameters, result, damage)


def _zeros(checkpoint: Checkpoint) -> int:
    """Return the number of zeros in the linears of a checkpoint."""
    weights = sum(
        out * into for block in all_shapes(checkpoint.model) for out, into in block.values()
    )
    nonzero = measure_size(checkpoint.model).nonzero
    return weights - sum(sum(block.values()) for block in nonzero)


def shape_tree(block: Any) -> Any:
    """Return a block of shapes, which count as no memory in a planned run."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), block)


def drawer(
    source: str,
    length: int,
    seed: int,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], TextTokenizer],
    mesh: Mesh | None,
) -> Callable[[int], np.ndarray]:
    """Return a function that draws other windows than those of a run, from the same source.

    Args:
      source: Data set, file, `self`, or a mix of these.
      length: Tokens in a window; 0: the model's own length.
      seed: Seed of the run's windows.
      checkpoint: The dense model.
      tokenizer: Returns its tokenizer.
      mesh: Devices; None: one.

    Returns:
      Number of windows -> windows, int [samples length].
    """

    def draw(count: int) -> np.ndarray:
        other = seed + DRAW
        return read_calibration(source, count, length, other, checkpoint, tokenizer, mesh).ids

    return draw
