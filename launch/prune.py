"""Prune a model and write a checkpoint that transformers loads, with what it cost.

python -m launch.prune --flagfile=configs/llmrank.flags
python -m launch.prune --model=DIR --method=wanda --sparsity=0.5 --calibration=wikitext2 --eval_data=wikitext2 --output=OUT
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from calibration.data import Tokens
from calibration.journal import Journal, file_digest
from calibration.runtime import Runtime
from calibration.states import Offload
from calibration.states import available_memory as memory_there
from calibration.step_cache import StepCache
from calibration.tokenizer import TextTokenizer
from eval.size import peak_memory
from launch.flags import cli
from launch.flags.cli import Flags, frozen
from launch.flags.common import (
    DTYPES,
    calibration_flags,
    evaluation_flags,
    layout_flag,
    mask_flags,
    model_flags,
    offload_for,
    open_model,
    output_path,
)
from launch.flags.protocols import protocol_flag, stamp
from launch.report import console, removal
from launch.report import html as report
from launch.run import draws, export
from launch.run.code import code_digests
from launch.run.complete import complete
from launch.run.job import RunConfig, request_of
from launch.run.measure import (
    Clock,
    evaluate,
    protocol,
    read_calibration,
    read_evaluation,
    tokenizer_of,
)
from launch.run.processes import process_flags, start
from launch.run.samples import samples
from launch.run.staging import UNFINISHED, staged
from launch.run.tasks import ZeroShot, evaluate_tasks, read_tasks, task_flags
from models.arch import Model
from models.checkpoint.output_format import preview
from models.checkpoint.reader import Checkpoint, weight_files
from models.checkpoint.writer import Writer, write_json
from models.processes import check_agreement, is_primary, run_on_primary
from pruning.figures import to_json
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Method, Outcome, Request

EVALUATED = 1  # steps of a run before it prunes: nothing to keep for another attempt
# What runs that share steps differ in.
VARIED = (
    *(
        "--method",
        "code of --method",
        "--sparsity",
        "--allocation",
        "code of --allocation",
        "--seed",
    ),
    *("--calibration tokens", "further draws"),
)
SHARED = "a trial of a sweep: its seconds leave out what earlier ones had computed or compiled, its peak memory is the process's so far"


def options() -> Flags:
    """The flags of `launch.prune`."""
    f = Flags("launch.prune", __doc__ or "")
    model_flags(f)
    f.string("output", None, "directory to write the pruned model, its report and pruning.json to")
    layout_flag(f)
    f.boolean(
        "resume", True, "go on from the last finished block of the same run, if it was interrupted"
    )
    f.group("Method")
    f.string(
        "method", "llmrank", f'a name or a call such as llmrank(scorer="mpr"): {", ".join(METHODS)}'
    )
    f.number(
        "sparsity", None, "fraction to remove, 0 <= s < 1, of the parameters the method covers"
    )
    f.string(
        "allocation",
        "uniform",
        f"how the sparsity is spread over blocks and linears: {', '.join(ALLOCATIONS)}",
    )
    mask_flags(f)
    protocol_flag(f)
    calibration_flags(f)
    f.integer("seed", 0, "of the windows drawn, and of what is random in a method")
    evaluation_flags(f)
    task_flags(f)
    process_flags(f)
    return f


class Finished(NamedTuple):
    """What a run has in hand when the checkpoint is written: all that the report is made of.

    `dense` and `pruned` have what was measured of the models: "perplexity" by data set, "tasks" by task; `further` is what
    `draws.record` says of the draws behind the first.
    """

    checkpoint: Checkpoint
    calibration: Tokens
    data: dict[str, Tokens]
    sparsity: float
    outcome: Outcome
    written: export.Written
    dense: dict[str, dict[str, Any]]
    pruned: dict[str, dict[str, Any]]
    zero_shot: ZeroShot | None
    further: list[dict[str, Any]]


def describe(
    config: RunConfig, run: Finished, counts: removal.LinearCounts, parameters: int
) -> dict[str, Any]:
    """The report, but for the seconds; `parameters` are the pruned model's, padding not counted."""
    checkpoint, outcome = run.checkpoint, run.outcome
    dense, pruned = run.dense["perplexity"], run.pruned["perplexity"]
    settings = dataclasses.asdict(config) | {"sparsity": run.sparsity}
    sparsity = removal.sparsity(checkpoint, outcome, counts, checkpoint.parameters, run.sparsity)
    removed = export.by_linear(
        checkpoint.specs, outcome.removed, lambda r: list(r.rows or r.columns)
    )
    drawn = [draws.record(run.calibration, run.pruned), *run.further]
    return {
        "model": config.model,
        "method": config.method,
        "settings": settings,
        "command": command(config),
        "protocol": stamp(config.protocol, settings)
        | {"calibration": run.calibration.protocol}
        | protocol(run.data, run.zero_shot),
        "sparsity": sparsity,
        "parameters": {"dense": checkpoint.parameters, "pruned": parameters},
        "bytes": {
            "dense": checkpoint.parameters * DTYPES[config.dtype].dtype.itemsize,
            "pruned": run.written.loaded.stored_bytes,
        },
        "perplexity": {
            name: {
                "dense": found["perplexity"],
                "pruned": pruned[name]["perplexity"],
                "dense_stderr": found["error"],
                "pruned_stderr": pruned[name]["error"],
                "tokens": found["tokens"],
            }
            for name, found in dense.items()
        },
        "tasks": {
            name: {"dense": run.dense["tasks"][name], "pruned": found}
            for name, found in run.pruned["tasks"].items()
        },
        **({"draws": drawn, "spread": draws.spread(drawn)} if run.further else {}),
        "peak_memory_bytes": peak_memory(jax.local_devices()),
        "scores": removal.score_quantiles(checkpoint, outcome),
        "warnings": [
            *removal.warnings(sparsity, run.written, checkpoint, run.calibration.ids.shape[1]),
            *outcome.warnings,
        ],
        "loads_as": run.written.form.label,
        "checks": {"topiary": True, "transformers": run.written.transformers.found},
        "load_back": {
            "topiary": run.written.topiary,
            "transformers": run.written.transformers.said,
        },
        "figures": [to_json(figure) for figure in outcome.figures],
        "details": dict(outcome.details) | ({"removed": removed} if removed else {}),
    }


def fingerprint(config: RunConfig, inputs: "Inputs") -> dict[str, Any]:
    """All that the result depends on, by a name for people: what an interrupted run must have in common with the one that goes on."""
    checkpoint, _, calibration, further, data, zero_shot = inputs
    settings = {flag.name: getattr(config, flag.name) for flag in dataclasses.fields(config)}
    # Told by content, or of no matter.
    elsewhere = (
        "model",
        "output",
        "resume",
        "protocol",
        "calibration",
        "eval_data",
        "activations",
        "tasks",
        "task_cache",
    )
    versions = protocol({}, zero_shot)
    return {
        "model configuration": checkpoint.config,
        "weights": {p.name: file_digest(p) for p in weight_files(checkpoint.directory)},
        "--calibration tokens": calibration.protocol["sha256"],
        "further draws": [tokens.protocol["sha256"] for tokens in further],
        "--eval_data tokens": {name: tokens.protocol["sha256"] for name, tokens in data.items()},
        "--tasks requests": zero_shot.protocol if zero_shot else {},
        **{f"--{name}": value for name, value in settings.items() if name not in elsewhere},
        **code_digests(config),
        **{f"version of {name}": value for name, value in versions["versions"].items()},
        **{f"device {name}": value for name, value in versions["device"].items()},
    }


class Inputs(NamedTuple):
    """What a run reads. `further`: calibration windows of the draws behind the first."""

    checkpoint: Checkpoint
    tokenizer: Callable[[], TextTokenizer]
    calibration: Tokens
    further: list[Tokens]
    data: dict[str, Tokens]
    zero_shot: ZeroShot | None


def read_tokens(
    config: RunConfig,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], TextTokenizer],
    memory: StepCache,
) -> tuple[list[Tokens], dict[str, Tokens]]:
    """The tokens to calibrate on, a draw after the other, and those to evaluate on by data set; InputError for what cannot be read."""

    def draw(seed: int) -> Tokens:
        source = (config.calibration, config.calibration_samples, config.calibration_length, seed)
        return memory.get_or_compute(
            (config.model, *source), lambda: read_calibration(*source, checkpoint, tokenizer)
        )

    drawn = [draw(config.seed + k) for k in range(config.calibration_draws)]
    draws.check_different(drawn, config.calibration)
    sources = (config.eval_data, config.eval_length, config.eval_windows)
    data = memory.get_or_compute(
        (config.model, *sources), lambda: read_evaluation(*sources, checkpoint, tokenizer)
    )
    return drawn, data


def read_inputs(config: RunConfig, method: Method, request: Request, memory: StepCache) -> Inputs:
    """Open the model and read all tokens; InputError for what cannot be read, or does not go with the method."""
    checkpoint = open_model(config.model, config.dtype)
    method.check(checkpoint.model, request)
    console.note(
        f"the result will load as {preview(checkpoint.config, method.shape_change, config.layout)}"
    )
    tokenizer = tokenizer_of(checkpoint)
    (calibration, *further), data = read_tokens(config, checkpoint, tokenizer, memory)
    zero_shot = read_tasks(config.tasks, config.limit, config.num_fewshot, checkpoint, tokenizer)
    return Inputs(checkpoint, tokenizer, calibration, further, data, zero_shot)


def measured(
    config: RunConfig, inputs: Inputs, which: Checkpoint, mesh: Mesh | None
) -> dict[str, Any]:
    """What the report has of the dense or the pruned model: "perplexity" by data set, "tasks" by task."""
    tasks = evaluate_tasks(
        inputs.zero_shot, which, config.calibration_batch, mesh, config.task_cache
    )
    return {
        "perplexity": evaluate(which.model, inputs.data, config.calibration_batch, mesh),
        "tasks": tasks,
    }


def journal_of(
    directory: pathlib.Path, facts: Mapping[str, Any], writer: Writer, memory: StepCache | None
) -> Journal:
    """The journal of a run with this fingerprint; runs of one process that differ in VARIED alone share what they remember."""
    common = json.dumps({name: fact for name, fact in facts.items() if name not in VARIED})
    return Journal(directory, facts, writer, memory, common)


def tier_of(config: RunConfig, model: Model, calibration: Tokens, mesh: Mesh | None) -> Offload:
    """Where this run's hidden states lie."""
    return offload_for(
        config.activations,
        jax.eval_shape(model.arch.embed, model.non_block, calibration.ids),
        mesh,
        memory_there(),
    )


def prune_further(
    config: RunConfig,
    inputs: Inputs,
    method: Method,
    request: Request,
    runtime: Runtime,
    work: pathlib.Path,
    facts: Mapping[str, Any],
    journal: Journal,
    clock: Clock,
) -> list[dict[str, Any]]:
    """`draws.record` of each draw behind the first, a step of the run's journal each, whose files stay in `work` until it is one.

    Args:
      facts: the run's fingerprint.
    """
    found = []
    for tokens in inputs.further:
        place = work / f"draw-{tokens.protocol['seed']}"

        def repeat(tokens: Tokens = tokens, place: pathlib.Path = place) -> dict[str, Any]:
            def measure(pruned: Checkpoint) -> dict[str, Any]:
                return measured(config, inputs, pruned, runtime.mesh)

            return draws.prune_on(
                tokens,
                inputs.checkpoint,
                method,
                request,
                runtime,
                place,
                facts,
                config.layout,
                measure,
            )

        found.append(journal.step(repeat))
        run_on_primary(functools.partial(shutil.rmtree, place, ignore_errors=True))
        clock.lap("draws")
    return found


def prune(config: RunConfig, memory: StepCache | None = None) -> dict[str, Any]:
    """One run: read, evaluate, prune, write, load back, evaluate again. Returns the report that stands in the output directory.

    Args:
      memory: of the other runs of this process, where it is one of a sweep's trials; no result depends on it.
    """
    clock = Clock(
        "load", "calibrate_and_prune", *["draws"] * (config.calibration_draws > 1), "eval", "export"
    )
    method, request, runtime = request_of(config)
    output = output_path(config.output)
    inputs = read_inputs(config, method, request, memory or StepCache(0))
    checkpoint, tokenizer, calibration, _, data, zero_shot = inputs
    clock.lap("load")
    journal: Journal | None = None

    def begun() -> bool:
        return (
            journal.finished > EVALUATED
            if journal
            else (directory / UNFINISHED / "journal").is_dir()
        )  # of a refused run

    with staged(output, export.REPORT, config.resume, begun) as directory:
        work = directory / UNFINISHED
        writer = Writer(directory, checkpoint.config, config.layout, work=work / "blocks")
        facts = fingerprint(config, inputs)
        check_agreement(facts)
        journal = journal_of(work / "journal", facts, writer, memory)
        if went_on := journal.finished > EVALUATED:
            console.note(
                f"going on with an interrupted run, {writer.blocks} blocks are finished (--noresume begins anew)"
            )
        clock.lap("load")
        dense = journal.step(lambda: measured(config, inputs, checkpoint, runtime.mesh), "dense")
        clock.lap("eval")
        echo = export.RoundTripCheck(checkpoint.model, writer)
        with console.progress() as stage:
            offload = tier_of(config, checkpoint.model, calibration, runtime.mesh)
            runtime = dataclasses.replace(runtime, offload=offload, progress=stage, journal=journal)
            outcome = method.run(checkpoint.model, calibration.ids, request, runtime, echo.put)
        clock.lap("calibrate_and_prune")
        further = prune_further(
            config, inputs, method, request, runtime, work, facts, journal, clock
        )
        written, counts = complete(
            directory, checkpoint, writer, echo, outcome, config.output_format, runtime.mesh
        )
        clock.lap("export")
        pruned = measured(config, inputs, written.loaded, runtime.mesh)
        clock.lap("eval")
        target = next(iter(outcome.asked[0].values())) if method.sets_sparsity else request.sparsity
        run = Finished(
            checkpoint,
            calibration,
            data,
            target,
            outcome,
            written,
            dense,
            pruned,
            zero_shot,
            further,
        )
        result = describe(config, run, counts, writer.parameters)
        # After the peak memory was read: samples hold whole models.
        result["samples"] = run_on_primary(lambda: samples(checkpoint, written.loaded, tokenizer))
        clock.lap("eval")
        result["seconds"] = clock.seconds
        result["warnings"] += [
            "the run was interrupted: its seconds are those since it went on"
        ] * went_on
        result["warnings"] += [SHARED] * (memory is not None)
        run_on_primary(lambda: write_reports(directory, result))
    return result


def write_reports(directory: pathlib.Path, result: Mapping[str, Any]) -> None:
    """The report, for programs and for people."""
    write_json(directory / export.REPORT, result)
    report.write_html(result, directory / "report.html")


def command(config: RunConfig) -> str:
    """The command that repeats the run."""
    f = options()
    given = f.given({flag.name: getattr(config, flag.name) for flag in dataclasses.fields(config)})
    return shlex.join(["python", "-m", "launch.prune", *given])


def main(values: dict[str, Any]) -> None:
    """Run, then show the closing table."""
    start(values)
    result = prune(frozen(RunConfig, values))
    if is_primary():
        console.show(result, Console())


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
