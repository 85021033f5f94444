"""Recover the pruned model of a run of launch.prune, and plan that on shapes."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calibration.runtime import Runtime
from launch.flags.dtypes import stored_dtype
from launch.report.progress import prefixed
from launch.run.comparisons import Comparisons
from launch.run.describe import Recovery, Results
from launch.run.inputs import Inputs
from launch.run.job import Job, Output
from launch.run.measure import Clock
from launch.run.recovery import (
    Task,
    check_chain,
    drawer,
    recover_all,
    shape_tree,
    with_room,
)
from launch.run.staging import Stage
from models.arch import Model
from pruning.recovery.types import RecoveryInputs
from pruning.types import Request

PRUNED = "pruned"  # folder of the pruned checkpoint, below that of the unfinished run


def pruned_place(job: Job, stage: Stage) -> tuple[pathlib.Path, Output]:
    """Return the directory and the form of the pruned checkpoint of a run.

    Args:
      job: The run.
      stage: Its directories.
    """
    if not job.recoveries:
        return stage.result, job.output
    # Only the recovery reads it.
    return stage.work / PRUNED, job.output._replace(format="hf", pack="none")


def recover(
    stage: Stage,
    job: Job,
    inputs: Inputs,
    runtime: Runtime,
    facts: Mapping[str, Any],
    results: Results,
    measure: Comparisons,
    clock: Clock,
) -> Results:
    """Recover and measure the pruned model of a run, and write all files of the result.

    Args:
      stage: Directories of the run.
      job: The run.
      inputs: What it has read.
      runtime: How it executes.
      facts: Its fingerprint.
      results: Its results up to here.
      measure: Measures models.
      clock: Gets the seconds of "recover" and "eval".
    """
    dense, source, pruned = inputs.checkpoint, job.sources.calibration, results.written.loaded
    origin = (source.name, source.length, job.config.seed)
    task = Task(
        job.recoveries,
        dense,
        results.outcome.kept_blocks or tuple(range(len(pruned.specs))),
        inputs.calibration.ids,
        drawer(*origin, dense, inputs.tokenizer, job.runtime.mesh),
        job.config.seed,
        with_room(runtime, job.config.activations, dense.model, inputs.calibration.ids),
        facts,
        stage.work,
        job.output,
        stored_dtype(job.sources.dtype, dense),
    )
    done = recover_all(task, pruned, stage.result)
    clock.record("recover")
    name = prefixed(job.runtime.progress, "recovered model: ")
    measured = measure.pruned(done.written.loaded, name)
    clock.record("eval")
    record = {"stages": done.records, "zeros": done.zeros}
    recovery = Recovery(measured, record, done.figures, done.warnings, done.notes)
    return results._replace(written=done.written, parameters=done.parameters, recovery=recovery)


def check(job: Job, model: Model, windows: int) -> None:
    """Check before any work that the recoveries of a run can be done.

    Args:
      job: The run.
      model: The dense model.
      windows: Number of calibration windows.

    Raises:
      InputError: One of them cannot.
    """
    check_chain(job.recoveries, model, job.method.shape_change(model), windows)


def plan_run(
    job: Job, model: Model, tokens: np.ndarray, request: Request, runtime: Runtime
) -> None:
    """Follow the method and the recoveries of a planned run on shapes.

    Args:
      job: The run.
      model: The dense model, of shapes.
      tokens: Calibration windows of zeros, int [samples length].
      request: What to remove.
      runtime: How the run executes.
    """
    pruned: dict[int, Any] = {}

    def keep_shapes(i: int, block: Any) -> None:
        pruned[i] = shape_tree(block)

    outcome = job.method.run(model, tokens, request, runtime, keep_shapes)
    blocks = tuple(pruned[j] for j in range(len(pruned)))
    non_block = shape_tree(outcome.non_block or model.non_block)
    inputs = RecoveryInputs(
        model._replace(non_block=non_block, blocks=blocks),
        model,
        outcome.kept_blocks or tuple(range(len(blocks))),
        tokens,
        lambda count: np.zeros((count, tokens.shape[1]), tokens.dtype),
        pathlib.Path(PRUNED),
    )
    for call in job.recoveries:
        room = with_room(runtime, job.config.activations, model, tokens)
        # Writing blocks takes no program.
        call.recovery.run(inputs, room, lambda j, block: None)
