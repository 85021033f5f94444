r"""Prune a model in many ways and compare: a grid over methods, sparsities, allocations and seeds.

Each trial is a run of launch.prune.

python -m launch.sweep --flagfile=configs/sweep.flags
python -m launch.sweep --model=DIR --methods='wanda,flap(metric="WIFN")' --sparsities=0.3,0.5 \
  --seeds=0,1,2 --backend=ray --output=OUT
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console

from calibration.step_cache import StepCache
from launch.flags import calls, cli
from launch.flags.common import (
    calibration_flags,
    evaluation_flags,
    mask_flags,
    model_flags,
    open_model,
    output_path,
    target_flag,
)
from launch.flags.numbers import check_sparsity, numbers, seeds
from launch.flags.outputs import output_flags
from launch.flags.protocols import protocol_flag
from launch.report import console, sweep_report
from launch.run import export, tracking
from launch.run.inputs import read_data, read_draws
from launch.run.job import Job, RunConfig, check_method, resolve
from launch.run.measure import tokenizer_of
from launch.run.places import check_free
from launch.run.staging import alone, discard_work
from launch.run.tasks import task_flags
from launch.run.tracking import parse_tracker, track_flag
from launch.targets.settle import check_target
from launch.targets.syntax import parse_target
from launch.trials.backends import BACKENDS, Execution, parse_resources
from launch.trials.trial import Trial, error_line
from models.errors import InputError
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS

AXES = ("method", "sparsity", "target", "allocation", "refine", "seed")


def options() -> cli.Flags:
    """Define the flags: those of `launch.prune`, with lists for what trials differ in."""
    f = cli.Flags("launch.sweep", __doc__ or "")
    model_flags(f, writes=True)
    f.string("output", None, "directory of the sweep; the same command resumes it")
    f.boolean("resume", True, "continue interrupted trials; without, they start over")
    output_flags(f)
    _grid_flags(f)
    f.group("Method")
    mask_flags(f)
    protocol_flag(f)
    calibration_flags(f)
    evaluation_flags(f)
    task_flags(f)
    track_flag(f)
    _execution_flags(f)
    return f


def _grid_flags(f: cli.Flags) -> None:
    """Define the flags of what trials differ in."""
    f.group("Grid")
    f.string(
        "methods",
        "wanda",
        f'comma-separated names or calls such as llmrank(scorer="mpr"): {", ".join(METHODS)}; '
        "flap@0.2 sets its own sparsity, wanda+owl or wanda+dsnot its allocation or refinement",
        names=METHODS,
        several=True,
    )
    f.string(
        "sparsities",
        "",
        "comma-separated fractions to remove; empty if targets, a pattern or the methods set them",
    )
    target_flag(f, several=True)
    f.string(
        "allocations",
        "uniform",
        f"comma-separated: {', '.join(ALLOCATIONS)}",
        names=ALLOCATIONS,
        several=True,
    )
    f.string("seeds", "0", "comma-separated seeds of the calibration windows and the methods")


def _execution_flags(f: cli.Flags) -> None:
    """Define the flags of where trials run."""
    f.group("Execution")
    f.choice(
        "backend",
        "local",
        tuple(BACKENDS),
        "run trials in this process, on a running Ray cluster, or as Slurm jobs",
    )
    f.integer(
        "workers",
        0,
        "ray: trials at a time, 0 for as many as fit; slurm: jobs, 0 for one per trial",
    )
    f.string(
        "resources",
        "",
        "resources of a trial; ray: CPU=8,TPU=4 (empty: a whole host); "
        "slurm: partition=gpu,timeout_min=600,...",
    )


class Amount(NamedTuple):
    """Amount to remove.

    Attributes:
      sparsity: Fraction; None if something else says it.
      target: Target; empty for none.
    """

    sparsity: float | None = None
    target: str = ""


def _settings(
    text: str, amounts: Sequence[Amount], allocations: Sequence[str], refine: str
) -> Iterator[dict[str, float | str | None]]:
    """Yield the settings of every trial of one method.

    Args:
      text: Item of --methods; what it sets itself takes the place of the other arguments.
      amounts: Sparsities and targets of the grid.
      allocations: Allocations of the grid.
      refine: Refinement of the sweep.
    """
    asked = calls.parse_method_spec(text)
    method = calls.build("method", asked.call, METHODS)
    own_refinements = [call for call in asked.modifiers if calls.parse_call(call)[0] in REFINEMENTS]
    own_allocations = [call for call in asked.modifiers if call not in own_refinements]
    if len(own_refinements) > 1 or len(own_allocations) > 1:
        raise InputError(
            f"{text!r} has two allocations or two refinements", "leave one of them out"
        )
    if own_refinements:
        refine = own_refinements[0]
    if own_allocations:
        allocations = own_allocations
    for allocation in allocations:
        calls.build("allocation", allocation, ALLOCATIONS)
    if asked.sparsity is not None:
        amounts = [Amount(asked.sparsity)]
    elif method.sets_sparsity:  # the method sets its own sparsity
        amounts = [Amount()]
    for allocation, amount in itertools.product(allocations, amounts):
        yield {
            "method": asked.call,
            **amount._asdict(),
            "allocation": allocation,
            "refine": refine,
        }


def _amounts(values: dict[str, Any]) -> list[Amount]:
    """Return the sparsities and targets of the grid."""
    amounts = []
    if values["sparsities"]:
        wanted = "fractions from 0 to below 1"
        sparsities = numbers("sparsities", values["sparsities"], float, lambda v: True, wanted)
        for sparsity in sparsities:
            check_sparsity(sparsity, "sparsities")
            amounts.append(Amount(sparsity=sparsity))
    if values["targets"]:
        texts = [text.strip() for text in values["targets"].split(",")]
        amounts += [Amount(target=parse_target(text, "targets").text) for text in texts]
    return amounts


def grid(values: dict[str, Any], output: pathlib.Path) -> list[Trial]:
    """List every trial of a sweep, those with the same calibration windows next to each other.

    Args:
      values: Values of the flags.
      output: Directory of the sweep.

    Raises:
      InputError: A value of the grid is wrong or given twice.
    """
    amounts = _amounts(values) or [Amount()]
    methods, allocations = (
        calls.split_list(values["methods"]),
        calls.split_list(values["allocations"]),
    )
    trials = []
    for seed in seeds(values["seeds"]):
        for text in methods:
            for own in _settings(text, amounts, allocations, values["refine"]):
                # A trial that loses its worker goes on, also in a sweep that starts over.
                fixed = {"seed": seed, "resume": True, "push_to_hub": "", "scores": ""}
                settings = values | own | fixed
                trials.append(Trial.of(output, cli.frozen(RunConfig, settings)))
    names = [trial.name for trial in trials]
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise InputError(f"the sweep has {duplicates[0]} twice", "give each once")
    return trials


class Checked(NamedTuple):
    """Trials by whether they can be run.

    Attributes:
      possible: Trials that can be run.
      impossible: Trials that cannot, each with the reason.
    """

    possible: list[Trial]
    impossible: list[tuple[Trial, str]]


def check(trials: Sequence[Trial], backend: str, cache: StepCache) -> Checked:
    """Open the model, check every trial and read all tokens before any work.

    Args:
      trials: All trials of the sweep.
      backend: Name of the backend.
      cache: Keeps the tokens for trials that run in this process.

    Raises:
      InputError: An input cannot be read, or a value of the grid fits none of the others.
    """
    first = trials[0].config
    checkpoint = open_model(first.model, first.dtype, first.revision)
    reasons: dict[Trial, str] = {}
    jobs: dict[Trial, Job] = {}
    for trial in trials:
        # The devices of this host say nothing about those of other hosts.
        config = trial.config if backend == "local" else dataclasses.replace(trial.config, mesh="")
        try:
            jobs[trial] = resolve(config)
            check_method(jobs[trial], checkpoint.model)
            check_target(jobs[trial], checkpoint, cache)
        except InputError as e:
            reasons[trial] = error_line(e)
    for axis in AXES:
        for value in dict.fromkeys(getattr(t.config, axis) for t in trials):
            with_value = [t for t in trials if getattr(t.config, axis) == value]
            if all(t in reasons for t in with_value):
                raise InputError(f"{axis} {value}: {reasons[with_value[0]]}")
    possible, tokenizer = [t for t in trials if t not in reasons], tokenizer_of(checkpoint)
    for trial in possible:
        read_data(jobs[trial], checkpoint, tokenizer, cache)
        # Elsewhere the trials' own devices write the windows: this process has a CPU alone.
        if backend == "local" or not jobs[trial].sources.calibration.generated:
            read_draws(jobs[trial], checkpoint, tokenizer, cache)
    return Checked(possible, list(reasons.items()))


def sweep(values: dict[str, Any]) -> sweep_report.Board:
    """Run every trial that is not finished and write the sweep's files.

    Args:
      values: Values of the flags.

    Returns:
      The states and results of all trials.
    """
    output, backend = output_path(values["output"]), values["backend"]
    tracker = parse_tracker(values["track"])
    execution = Execution(parse_resources(values["resources"]), values["workers"], StepCache())
    if backend != "local":
        # A trial may run on this host's accelerator, so this process must not hold it.
        jax.config.update("jax_platforms", "cpu")
    trials = grid(values, output)
    check_free(output, sweep_report.INDEX)
    possible, impossible = check(trials, backend, execution.cache)
    for trial, reason in impossible:
        console.note(f"left out: {trial.name}: {reason}")
    with alone(output):
        board = sweep_report.Board(output, values, possible, impossible)
        waiting = [trial for trial in possible if not board.update(trial)]
        if not values["resume"]:
            for trial in waiting:
                discard_work(pathlib.Path(str(trial.config.output)), export.REPORT)
        finished = len(possible) - len(waiting)
        if finished:
            console.note(f"{finished} of {len(possible)} trials are finished, {len(waiting)} to go")
        board.save()
        try:
            with contextlib.closing(BACKENDS[backend](waiting, execution)) as ended:
                for trial, error in ended:
                    board.update(trial, error)
                    board.save()
                    console.note(board.progress_line(trial))
        finally:
            board.publish()
    tracking.write(tracker, lambda: tracking.of_sweep(values, board.rows))
    return board


def main(values: dict[str, Any]) -> int:
    """Run the sweep, print its table, and return 1 if a trial failed, else 0."""
    board = sweep(values)
    board.show(Console())
    return int(bool(board.errors))


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
