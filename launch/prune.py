r"""Prune a model and write a checkpoint that transformers loads, with a report.

python -m launch.prune --flagfile=configs/llmrank.flags
python -m launch.prune --model=DIR --method=wanda --sparsity=0.5 --calibration=wikitext2 \
  --eval_data=wikitext2 --output=OUT
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from calibration.journal import Journal, StepCache
from calibration.runtime import Runtime
from calibration.states import available_memory
from calibration.step_cache import ScoreCache
from launch.flags import cli, quoting
from launch.flags.cli import Flags, frozen
from launch.flags.common import (
    calibration_flags,
    evaluation_flags,
    mask_flags,
    model_flags,
    offload_for,
    output_path,
    target_flag,
)
from launch.flags.outputs import output_flags
from launch.flags.protocols import protocol_flag
from launch.report import console
from launch.report.files import write_reports
from launch.report.progress import prefixed, progress
from launch.run import draws, export, recovered_run, tracking
from launch.run.agreement import DenseStates
from launch.run.card import write_card
from launch.run.comparisons import Comparisons
from launch.run.compilation import counted
from launch.run.complete import complete, least_bytes
from launch.run.describe import Results, describe
from launch.run.inputs import Inputs, read_inputs
from launch.run.job import Job, RunConfig, resolve
from launch.run.measure import Clock
from launch.run.optional import optional
from launch.run.places import check_free, check_space
from launch.run.processes import process_flags, start
from launch.run.push import check_push, push
from launch.run.resume import (
    JOURNAL,
    Attempt,
    fingerprint,
    open_journal,
    open_writer,
    shared_context,
)
from launch.run.samples import Samples, samples, with_greedy
from launch.run.scores import score_cache, stamp, write_scores
from launch.run.staging import Stage, staged
from launch.run.tasks import task_flags
from launch.run.tracking import parse_tracker, track_flag
from launch.targets.result import add_result
from launch.targets.settle import settle
from models.checkpoint.reader import Checkpoint
from models.checkpoint.writer import Writer
from models.processes import check_agreement, is_primary, run_on_primary
from models.progress import Progress
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import BlockSink, Outcome

RESUMING = "resuming an interrupted run: {} blocks are finished (--noresume starts over)"
RESUMED = "the run was interrupted: its seconds count from its last start"
SCORES = "scores were read from {}: no forward measured them again"
TRIAL = (
    "a trial of a sweep: its seconds leave out work shared with earlier trials, and its peak "
    "memory is that of the process so far"
)


def options() -> Flags:
    """Define the flags of `launch.prune`."""
    f = Flags("launch.prune", __doc__ or "")
    model_flags(f, writes=True)
    f.string("output", None, "directory to write the pruned model and its report to")
    f.string(
        "push_to_hub", "", "owner/name on the hub to upload the output to; a new one is private"
    )
    output_flags(f)
    f.boolean("resume", True, "continue an interrupted run behind its last finished block")
    f.string(
        "scores",
        "",
        "output of an earlier run whose scores serve this one: same model, calibration and method, "
        "another sparsity",
    )
    f.group("Method")
    f.string(
        "method",
        "llmrank",
        f'name or call such as llmrank(scorer="mpr"): {", ".join(METHODS)}',
        names=METHODS,
    )
    f.number(
        "sparsity", None, "fraction to remove, 0 <= s < 1, of the parameters that the method covers"
    )
    target_flag(f)
    f.string(
        "allocation",
        "uniform",
        f"spreads the sparsity over blocks and linears: {', '.join(ALLOCATIONS)}",
        names=ALLOCATIONS,
    )
    mask_flags(f)
    protocol_flag(f)
    calibration_flags(f)
    f.integer("seed", 0, "seed of the calibration windows and of the method")
    evaluation_flags(f)
    task_flags(f)
    track_flag(f)
    process_flags(f)
    return f


def prune(config: RunConfig, cache: StepCache | None = None) -> dict[str, Any]:
    """Prune a model: read, evaluate, prune, write, load back, evaluate again.

    Args:
      config: Settings of the run.
      cache: Shared with the other runs of this process, for trials of a sweep. Results do not
        depend on it.

    Returns:
      The report, as it stands in the output directory.

    Raises:
      InputError: A setting or an input is wrong; the output is not touched.
    """
    job, tracker = resolve(config), parse_tracker(config.track)
    further = ["draws"] if config.calibration_draws > 1 else []
    further += ["recover"] if job.recoveries else []
    clock = Clock("load", "calibrate_and_prune", *further, "eval", "export")
    output = output_path(job.output.directory)
    run_on_primary(lambda: check_free(output, export.REPORT))
    inputs = read_inputs(job, cache or StepCache(0))
    attempt = Attempt()
    with (
        progress() as shown,
        counted() as compilation,
        staged(output, export.REPORT, job.output.resume, attempt.keeps) as stage,
    ):
        job = dataclasses.replace(job, runtime=dataclasses.replace(job.runtime, progress=shown))
        result = _prune_into(stage, job, inputs, attempt, clock, cache)
        result["seconds"] = clock.seconds
        result["compilation"] = compilation.record()
        result["warnings"] += run_on_primary(lambda: write_reports(stage.result, result))
        source = inputs.checkpoint.directory
        run_on_primary(lambda: write_card(stage.result, result, source))
    tracking.write(tracker, lambda: tracking.of_run(result))
    return result


def _prune_into(
    stage: Stage,
    job: Job,
    inputs: Inputs,
    attempt: Attempt,
    clock: Clock,
    cache: StepCache | None,
) -> dict[str, Any]:
    """Write the pruned model into a staged directory; return the report without its seconds."""
    directory, work = stage
    checkpoint, mesh, shown = inputs.checkpoint, job.runtime.mesh, job.runtime.progress
    job, aim = settle(job, checkpoint, work, cache)
    writer = open_writer(recovered_run.pruned_place(job, stage)[0], work, job, checkpoint)
    facts = fingerprint(job, inputs)
    check_agreement(facts)
    scores = score_cache(job, inputs, facts, cache or StepCache(0))
    journal = open_journal(work / JOURNAL, facts, writer, scores or cache)
    attempt.journal = journal
    run_on_primary(lambda: check_space(directory, least_bytes(job, checkpoint), writer.files))
    remarks = _remarks(attempt, writer.blocks, cache is not None, job.config.scores)
    clock.record("load")
    measure = _comparisons(job, inputs, facts, cache or StepCache(0))
    dense = journal.step(lambda: measure.dense(prefixed(shown, "dense model: ")), "dense")
    clock.record("eval")
    check = _round_trip(job, checkpoint, writer)
    runtime = _with_offload(job, inputs)
    outcome = _run_method(job, inputs, runtime, journal, check.put)
    _keep_scores(directory, job, facts, scores)
    clock.record("calibrate_and_prune")
    repetition = draws.Repetition(job, checkpoint, runtime, facts, work, measure.pruned, [])
    further = draws.prune_draws(inputs.further_draws, repetition, journal)
    if further:
        clock.record("draws")
    place, form = recovered_run.pruned_place(job, stage)
    written, counts = complete(place, checkpoint, writer, check, outcome, form, mesh, shown)
    clock.record("export")
    pruned = _measure_pruned(job, journal, measure, written.loaded)
    clock.record("eval")
    sizes, notes = writer.parameters, writer.remarks
    results = Results(outcome, written, counts, sizes, dense, pruned, further, notes)
    if job.recoveries:
        results = recovered_run.recover(stage, job, inputs, runtime, facts, results, measure, clock)
    result = describe(job, inputs, results, command(job.config))
    result["notes"] += remarks
    result["warnings"] += [f"unfinished run: {s}" for s in (*journal.damage, *repetition.damage)]
    # After the peak memory was read: both hold whole models.
    if aim is not None:
        add_result(result, aim.record, checkpoint, results.written, counts)
    _add_samples(result, inputs, written.loaded, results, shown)
    clock.record("eval")
    return result


def _measure_pruned(
    job: Job, journal: Journal, measure: Comparisons, pruned: Checkpoint
) -> dict[str, Any]:
    """Measure the pruned model, durably where a recovery follows, which may be interrupted."""
    shown = prefixed(job.runtime.progress, "pruned model: ")
    if not job.recoveries:
        return measure.pruned(pruned, shown)
    measured: dict[str, Any] = journal.step(lambda: measure.pruned(pruned, shown))
    return measured


def _add_samples(
    result: dict[str, Any], inputs: Inputs, pruned: Checkpoint, results: Results, shown: Progress
) -> None:
    """Add to a report the texts of all models and how long their greedy texts are equal."""
    recovered = results.written.loaded if results.recovery else None
    generate = functools.partial(
        samples, inputs.checkpoint, pruned, inputs.tokenizer, inputs.data, shown, recovered
    )
    nothing = Samples([], {})
    (result["samples"], greedy), missed = run_on_primary(
        lambda: optional("no sample texts", generate, nothing)
    )
    result["agreement"] = with_greedy(result["agreement"], greedy)
    result["warnings"] += missed


def _round_trip(job: Job, checkpoint: Checkpoint, writer: Writer) -> export.RoundTripCheck:
    """Return the check of the written blocks, which waits for a method that cuts the stream."""
    narrower = bool(job.method.shape_change(checkpoint.model).hidden)
    return export.RoundTripCheck(checkpoint.model, writer, deferred=narrower)


def _keep_scores(
    directory: pathlib.Path, job: Job, facts: Mapping[str, Any], scores: ScoreCache | None
) -> None:
    """Write the scores beside the result, where they can serve another size."""
    if scores is not None:
        run_on_primary(lambda: write_scores(directory, stamp(job, facts), scores.scores))


def _remarks(attempt: Attempt, blocks: int, is_trial: bool, scores: str) -> list[str]:
    """Return the notes about a run's seconds; say where a resumed run goes on."""
    remarks = []
    if attempt.resumed:
        console.note(RESUMING.format(blocks))
        remarks.append(RESUMED)
    if is_trial:
        remarks.append(TRIAL)
    if scores:
        remarks.append(SCORES.format(scores))
    return remarks


def _comparisons(
    job: Job, inputs: Inputs, facts: Mapping[str, Any], cache: StepCache
) -> Comparisons:
    """Return the measurements, with the dense model's hidden states, which trials share."""
    checkpoint, data = inputs.checkpoint, inputs.data
    batch, mesh = job.runtime.batch, job.runtime.mesh
    key = ("dense states", shared_context(facts))
    states = cache.get_or_compute(key, lambda: DenseStates(checkpoint.model, data, batch, mesh))
    tasks = (inputs.zero_shot, batch, mesh, job.config.task_cache)
    return Comparisons(checkpoint, states, data, *tasks)


def _with_offload(job: Job, inputs: Inputs) -> Runtime:
    """Return the job's runtime with the memory for hidden states chosen."""
    model = inputs.checkpoint.model
    x = jax.eval_shape(model.arch.embed, model.non_block, inputs.calibration.ids)
    offload = offload_for(job.config.activations, x, job.runtime.mesh, available_memory())
    return dataclasses.replace(job.runtime, offload=offload)


def _run_method(
    job: Job, inputs: Inputs, runtime: Runtime, journal: Journal, sink: BlockSink
) -> Outcome:
    """Run the method with the journal."""
    runtime = dataclasses.replace(runtime, journal=journal)
    model, ids = inputs.checkpoint.model, inputs.calibration.ids
    return job.method.run(model, ids, job.request, runtime, sink)


def command(config: RunConfig) -> str:
    """Return the command that repeats a run.

    Args:
      config: Settings of the run.
    """
    return quoting.join(["python", "-m", "launch.prune", *options().given(vars(config))])


def main(values: dict[str, Any]) -> None:
    """Prune the model and print the closing table.

    Args:
      values: Values of the flags.
    """
    start(values)
    name = values["push_to_hub"]
    run_on_primary(lambda: check_push(name))
    result = prune(frozen(RunConfig, values))
    if is_primary():
        console.show(result, Console())
    if name:
        console.note(f"uploading to {name}")
        url = run_on_primary(lambda: push(name, output_path(values["output"])))
        console.note(f"uploaded: {url}")


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
