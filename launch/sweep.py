"""Prune a model in many ways and compare: a grid over methods, sparsities, allocations and seeds, a run of launch.prune each.

python -m launch.sweep --flagfile=configs/sweep.flags
python -m launch.sweep --model=DIR --methods='wanda,flap(metric="WIFN")' --sparsities=0.3,0.5 --seeds=0,1,2 --backend=ray --output=OUT
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

from calibration.journal import StepCache
from launch import prune
from launch.flags import calls, cli
from launch.flags.common import (
    calibration_flags,
    evaluation_flags,
    layout_flag,
    mask_flags,
    model_flags,
    numbers,
    open_model,
    output_path,
    seeds,
)
from launch.flags.protocols import protocol_flag
from launch.report import console, sweep_report
from launch.run.inputs import read_tokens
from launch.run.job import Job, RunConfig, resolve
from launch.run.measure import tokenizer_of
from launch.run.staging import alone, check_free
from launch.run.tasks import task_flags
from launch.trials.backends import BACKENDS, Where, parse_resources
from launch.trials.trial import Trial
from models.errors import InputError
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS

AXES = ("method", "sparsity", "allocation", "refine", "seed")


def options() -> cli.Flags:
    """The flags of `launch.sweep`: those of `launch.prune`, with lists for what trials differ in, and where they run."""
    f = cli.Flags("launch.sweep", __doc__ or "")
    model_flags(f)
    f.string("output", None, "directory of the sweep; the same command goes on with what is there")
    layout_flag(f)
    f.group("Grid")
    f.string(
        "methods",
        "wanda",
        f'comma-separated names or calls such as llmrank(scorer="mpr"): {", ".join(METHODS)}; '
        "flap@0.2 says its own sparsity, wanda+owl or wanda+dsnot its own allocation or refinement",
    )
    f.string(
        "sparsities",
        "",
        "comma-separated fractions to remove; empty where a pattern or the methods say how much",
    )
    f.string("allocations", "uniform", f"comma-separated: {', '.join(ALLOCATIONS)}")
    f.string(
        "seeds",
        "0",
        "comma-separated: of the calibration windows drawn, and of what is random in a method",
    )
    f.group("Method")
    mask_flags(f)
    protocol_flag(f)
    calibration_flags(f)
    evaluation_flags(f)
    task_flags(f)
    f.group("Where it runs")
    f.choice(
        "backend", "local", tuple(BACKENDS), "here, on an existing Ray cluster, or as jobs of Slurm"
    )
    f.integer(
        "workers",
        0,
        "trials at a time (ray; 0: as many as there is room for), or jobs (slurm; 0: one a trial)",
    )
    f.string(
        "resources",
        "",
        "of a trial: ray: CPU=8,TPU=4 (empty: a whole host); slurm: partition=gpu,timeout_min=600,...",
    )
    return f


def _asked(
    text: str, sparsities: Sequence[float | None], allocations: Sequence[str], refine: str
) -> Iterator[dict[str, float | str | None]]:
    """The settings of every trial of one method: what it says of itself, else each of these."""
    asked = calls.parse_method_spec(text)
    method = calls.build("method", asked.call, METHODS)
    refines = [call for call in asked.modifiers if calls.parse_call(call)[0] in REFINEMENTS]
    spreads = [call for call in asked.modifiers if call not in refines]
    if max(len(refines), len(spreads)) > 1:
        raise InputError(f"{text!r} has two allocations or two refinements: leave one of them out")
    refine, allocations = (refines or [refine])[0], spreads or allocations
    for allocation in allocations:
        calls.build("allocation", allocation, ALLOCATIONS)
    if asked.sparsity is not None:
        sparsities = [asked.sparsity]
    elif method.sets_sparsity:  # whatever the sparsities
        sparsities = [None]
    for allocation, sparsity in itertools.product(allocations, sparsities):
        yield {
            "method": asked.call,
            "sparsity": sparsity,
            "allocation": allocation,
            "refine": refine,
        }


def grid(values: dict[str, Any], output: pathlib.Path) -> list[Trial]:
    """Every trial that the flags ask for; those that share calibration tokens one after the other. InputError for an axis that is wrong."""
    sparsities: Sequence[float | None] = [None]
    if values["sparsities"]:
        sparsities = numbers(
            "sparsities",
            values["sparsities"],
            float,
            lambda v: 0 <= v < 1,
            "fractions from 0 to below 1",
        )
    methods = calls.split_list(values["methods"])
    allocations = calls.split_list(values["allocations"])
    trials = [
        Trial.of(output, cli.frozen(RunConfig, values | own | {"seed": seed, "resume": True}))
        for seed in seeds(values["seeds"])
        for text in methods
        for own in _asked(text, sparsities, allocations, values["refine"])
    ]
    names = [trial.name for trial in trials]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"the sweep has {twice[0]} twice: give each once")
    return trials


class Checked(NamedTuple):
    """Trials that can be, and what keeps the others from it."""

    possible: list[Trial]
    impossible: list[tuple[Trial, str]]


def check(trials: Sequence[Trial], backend: str, memory: StepCache) -> Checked:
    """Open the model, ask every method about its trials, and read all tokens, before any work.

    A combination that a method cannot follow is left out. InputError for what cannot be read, and for a method, sparsity, allocation or
    seed that goes with none of the others.
    """
    first = trials[0].config
    checkpoint = open_model(first.model, first.dtype)
    reasons: dict[Trial, str] = {}
    jobs: dict[Trial, Job] = {}
    for trial in trials:
        # Where trials run elsewhere, this host's devices say nothing of theirs.
        config = trial.config if backend == "local" else dataclasses.replace(trial.config, mesh="")
        try:
            jobs[trial] = resolve(config)
            jobs[trial].method.check(checkpoint.model, jobs[trial].request)
        except InputError as e:
            reasons[trial] = e.message(prune.options().shown)
    for axis in AXES:
        for value in dict.fromkeys(getattr(t.config, axis) for t in trials):
            found = [t for t in trials if getattr(t.config, axis) == value]
            if all(t in reasons for t in found):
                raise InputError(f"{axis} {value}: {reasons[found[0]]}")
    possible, tokenizer = [t for t in trials if t not in reasons], tokenizer_of(checkpoint)
    for trial in possible:
        read_tokens(jobs[trial], checkpoint, tokenizer, memory)
    return Checked(possible, list(reasons.items()))


def sweep(values: dict[str, Any]) -> sweep_report.Board:
    """Run every trial that is not finished. Returns what became of all of them, as it stands in the output directory."""
    output, backend = output_path(values["output"]), values["backend"]
    where = Where(parse_resources(values["resources"]), values["workers"], StepCache())
    if backend != "local":
        jax.config.update("jax_platforms", "cpu")  # the accelerator of this host may be a trial's
    trials = grid(values, output)
    check_free(output, sweep_report.INDEX)
    possible, impossible = check(trials, backend, where.memory)
    for trial, why in impossible:
        console.note(f"left out: {trial.name}: {why}")
    with alone(output):
        board = sweep_report.Board(output, values, possible, impossible)
        waiting = [trial for trial in possible if not board.look(trial)]
        if len(waiting) < len(possible):
            console.note(
                f"{len(possible) - len(waiting)} of {len(possible)} trials are finished, {len(waiting)} to go"
            )
        board.save()
        try:
            with contextlib.closing(BACKENDS[backend](waiting, where)) as ended:
                for trial, error in ended:
                    board.look(trial, error)
                    board.save()
                    console.note(board.said(trial))
        finally:
            board.publish()
    return board


def main(values: dict[str, Any]) -> int:
    """Run, show the table, and return 1 if a trial failed."""
    board = sweep(values)
    board.show(Console())
    return int(bool(board.errors))


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
