"""Prune a model and write a checkpoint that transformers loads, with what it cost.

python -m launch.prune --flagfile=configs/llmrank.flags
python -m launch.prune --model=DIR --method=wanda --sparsity=0.5 --calibration=wikitext2 --eval_data=wikitext2 --output=OUT
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from calibration.data import Tokens
from calibration.journal import Journal, Memory, file_digest
from calibration.tokenizer import TextTokenizer
from eval.size import Size, measure, peak_memory
from launch import calls, cli, console, export, report
from launch.cli import Flags, frozen
from launch.flags import (
    DTYPES,
    calibration_flags,
    check_sparsity,
    evaluation_flags,
    layout_flag,
    mask_flags,
    mesh_of,
    model_flags,
    open_model,
    output_path,
    tier_for,
)
from launch.measure import Clock, evaluate, protocol, read_calibration, read_evaluation, tokenizer_of
from launch.samples import samples
from launch.staging import UNFINISHED, staged
from launch.tasks import Results, ZeroShot, evaluate_tasks, read_tasks, task_flags
from models.errors import InputError
from models.forms import Layout, preview
from models.store import Checkpoint, weight_files
from models.writer import Writer, write_json
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.patterns import parse_pattern
from pruning.types import Method, Outcome, Request

EVALUATED = 1  # steps of a run before it prunes: nothing to keep for another attempt
VARIED = ("--method", "--sparsity", "--allocation", "--seed", "--calibration tokens")  # what runs that share steps differ in
SHARED = "a trial of a sweep: its seconds leave out what earlier ones had computed or compiled, its peak memory is the process's so far"
MISSED = 0.005  # a budget missed by more of the prunable weights is worth a warning


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on, as the flags of the same names say."""

    model: str | None
    method: str
    sparsity: float | None
    pattern: str
    allocation: str
    refine: str
    calibration: str
    calibration_samples: int
    calibration_length: int
    calibration_batch: int
    activations: str
    seed: int
    eval_data: str
    eval_length: int
    eval_windows: int
    output: str | None
    dtype: str
    mesh: str
    layout: Layout
    resume: bool
    tasks: str
    limit: int
    num_fewshot: int
    task_cache: bool


def options() -> Flags:
    """The flags of `launch.prune`."""
    f = Flags("launch.prune", __doc__ or "")
    model_flags(f)
    f.string("output", None, "directory to write the pruned model, its report and pruning.json to")
    layout_flag(f)
    f.boolean("resume", True, "go on from the last finished block of the same run, if it was interrupted")
    f.group("Method")
    f.string("method", "llmrank", f'a name or a call such as llmrank(scorer="mpr"): {", ".join(METHODS)}')
    f.number("sparsity", None, "fraction to remove, 0 <= s < 1, of the parameters the method covers")
    f.string("allocation", "uniform", f"how the sparsity is spread over blocks and linears: {', '.join(ALLOCATIONS)}")
    mask_flags(f)
    calibration_flags(f)
    f.integer("seed", 0, "of the windows drawn, and of what is random in a method")
    evaluation_flags(f)
    task_flags(f)
    return f


def request_of(config: RunConfig) -> tuple[Method, Request]:
    """The method and what is asked of it; InputError for anything about them that is wrong, before any work."""
    method = calls.build("method", config.method, METHODS)
    allocation = calls.build("allocation", config.allocation, ALLOCATIONS)
    refine = calls.build("refine", config.refine, REFINEMENTS)
    pattern = parse_pattern(config.pattern)
    sparsity = config.sparsity
    if pattern and config.allocation != "uniform":
        raise InputError(
            f"--pattern={config.pattern} sets the sparsity of every linear, --allocation spreads it: leave one of them out"
        )
    if pattern:
        share = pattern[0] / pattern[1]
        if sparsity is not None and abs(sparsity - share) > 1e-9:
            raise InputError(
                f"--sparsity={sparsity} with --pattern={config.pattern}, which removes {share:g}: leave --sparsity out"
            )
        sparsity = share
    if sparsity is None and method.counts:
        sparsity = 0.0
    if sparsity is None:
        raise InputError("--sparsity is missing: give the fraction to remove, such as 0.3")
    check_sparsity(sparsity)
    request = Request(
        sparsity,
        pattern,
        None if config.allocation == "uniform" else allocation,
        refine,
        batch=config.calibration_batch,
        mesh=mesh_of(config.mesh, config.calibration_batch),
        seed=config.seed,
    )
    return method, request


class Counts(NamedTuple):
    """Weights by linear's name: of the dense model, and of them those that are gone or zero."""

    dense: dict[str, int]
    gone: dict[str, int]


def count(checkpoint: Checkpoint, size: Size, kept: Sequence[int] | None = None) -> Counts:
    """What was removed from each linear, counted in the written checkpoint, which holds these blocks alone (None: all)."""
    specs, slots = checkpoint.specs, [s.name for s in checkpoint.model.arch.slots]
    dense = export.by_linear(specs, tuple({s: math.prod(getattr(b, s).w.shape) for s in slots} for b in specs))
    left = export.by_linear(specs if kept is None else tuple(specs[i] for i in kept), size.nonzero)
    return Counts(dense, {name: n - left.get(name, 0) for name, n in dense.items()})


def sparsity_figures(checkpoint: Checkpoint, outcome: Outcome, counts: Counts, dense: int, target: float) -> dict[str, Any]:
    """The report's `sparsity`: fractions of the dense model's weights that are gone or zero. "prunable" are those the method covers."""
    asked = export.by_linear(checkpoint.specs, outcome.asked)
    return {
        "target": target,
        "prunable": sum(counts.gone[name] for name in asked) / sum(counts.dense[name] for name in asked),
        "total": sum(counts.gone.values()) / dense,
        "per_linear": {name: gone / counts.dense[name] for name, gone in counts.gone.items()},
        "asked": asked,
    }


def quantiles(checkpoint: Checkpoint, outcome: Outcome) -> dict[str, Any]:
    """The report's `scores`: minimum, quartiles and maximum by linear."""
    levels = [0, 0.25, 0.5, 0.75, 1]
    per_linear = export.by_linear(checkpoint.specs, outcome.scores, lambda x: [float(q) for q in np.quantile(x, levels)])
    return {"label": outcome.scores_label, "per_linear": per_linear}


def warnings_of(figures: Mapping[str, Any], written: export.Written, checkpoint: Checkpoint, length: int) -> Iterator[str]:
    """What a reader of the figures must know."""
    if written.padding:
        yield f"{written.padding:,} of the stored numbers are zeros that fill narrower blocks and absent biases up"
    if written.form.code:
        yield f"blocks differ in width: the model loads as {written.form.label}; --layout=padded writes a stock model instead"
    if not written.transformers.ok:
        yield f"transformers does not give the same logits: {written.transformers.said}"
    if abs(figures["prunable"] - figures["target"]) > MISSED:
        yield f"asked for {figures['target']:.4f} of the prunable weights, got {figures['prunable']:.4f}"
    longest = checkpoint.config.get("max_position_embeddings")
    if longest and length > longest:
        yield f"calibration windows of {length} tokens are longer than the {longest} positions the model was trained for"


class Finished(NamedTuple):
    """What a run has in hand when the checkpoint is written: all that the report is made of.

    `dense` and `pruned` have the perplexities by data set, `tasks` the metrics of both models by task.
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
    tasks: dict[str, dict[str, Any]]


def describe(config: RunConfig, run: Finished, counts: Counts, parameters: int) -> dict[str, Any]:
    """The report, but for the seconds; `parameters` are the pruned model's, padding not counted."""
    checkpoint, outcome = run.checkpoint, run.outcome
    figures = sparsity_figures(checkpoint, outcome, counts, checkpoint.parameters, run.sparsity)
    removed = export.by_linear(checkpoint.specs, outcome.removed, lambda r: list(r.rows or r.columns))
    return {
        "model": config.model,
        "method": config.method,
        "settings": dataclasses.asdict(config) | {"sparsity": run.sparsity},
        "command": command(config),
        "protocol": {"calibration": run.calibration.protocol} | protocol(run.data, run.zero_shot),
        "sparsity": figures,
        "parameters": {"dense": checkpoint.parameters, "pruned": parameters},
        "bytes": {
            "dense": checkpoint.parameters * DTYPES[config.dtype].dtype.itemsize,
            "pruned": run.written.loaded.stored_bytes,
        },
        "perplexity": {
            name: {"dense": run.dense[name]["perplexity"], "pruned": run.pruned[name]["perplexity"], "tokens": found["tokens"]}
            for name, found in run.dense.items()
        },
        "tasks": run.tasks,
        "peak_memory_bytes": peak_memory(jax.local_devices()),
        "scores": quantiles(checkpoint, outcome),
        "warnings": [*warnings_of(figures, run.written, checkpoint, run.calibration.ids.shape[1]), *outcome.warnings],
        "loads_as": run.written.form.label,
        "load_back": {"topiary": run.written.topiary, "transformers": run.written.transformers.said},
        "details": dict(outcome.details) | ({"removed": removed} if removed else {}),
    }


def fingerprint(config: RunConfig, inputs: "Inputs") -> dict[str, Any]:
    """All that the result depends on, by a name for people: what an interrupted run must have in common with the one that goes on."""
    checkpoint, _, calibration, data, zero_shot = inputs
    settings = {flag.name: getattr(config, flag.name) for flag in dataclasses.fields(config)}
    # Told by content, or of no matter.
    elsewhere = ("model", "output", "resume", "calibration", "eval_data", "activations", "tasks", "task_cache")
    versions = protocol({}, zero_shot)
    return {
        "model configuration": checkpoint.config,
        "weights": {p.name: file_digest(p) for p in weight_files(checkpoint.directory)},
        "--calibration tokens": calibration.protocol["sha256"],
        "--eval_data tokens": {name: tokens.protocol["sha256"] for name, tokens in data.items()},
        "--tasks requests": zero_shot.protocol if zero_shot else {},
        **{f"--{name}": value for name, value in settings.items() if name not in elsewhere},
        **{f"version of {name}": value for name, value in versions["versions"].items()},
        **{f"device {name}": value for name, value in versions["device"].items()},
    }


class Inputs(NamedTuple):
    """What a run reads."""

    checkpoint: Checkpoint
    tokenizer: Callable[[], TextTokenizer]
    calibration: Tokens
    data: dict[str, Tokens]
    zero_shot: ZeroShot | None


def read_tokens(
    config: RunConfig, checkpoint: Checkpoint, tokenizer: Callable[[], TextTokenizer], memory: Memory
) -> tuple[Tokens, dict[str, Tokens]]:
    """The tokens to calibrate on, and those to evaluate on by data set; InputError for what cannot be read."""
    source = (config.model, config.calibration, config.calibration_samples, config.calibration_length, config.seed)
    calibration = memory.of(source, lambda: read_calibration(*source[1:], checkpoint, tokenizer))
    sources = (config.model, config.eval_data, config.eval_length, config.eval_windows)
    return calibration, memory.of(sources, lambda: read_evaluation(*sources[1:], checkpoint, tokenizer))


def read_inputs(config: RunConfig, method: Method, request: Request, memory: Memory) -> Inputs:
    """Open the model and read all tokens; InputError for what cannot be read, or does not go with the method."""
    checkpoint = open_model(config.model, config.dtype)
    method.check(checkpoint.model, request)
    console.note(f"the result will load as {preview(checkpoint.config, method.leaves, config.layout)}")
    tokenizer = tokenizer_of(checkpoint)
    calibration, data = read_tokens(config, checkpoint, tokenizer, memory)
    zero_shot = read_tasks(config.tasks, config.limit, config.num_fewshot, checkpoint, tokenizer)
    return Inputs(checkpoint, tokenizer, calibration, data, zero_shot)


def prune(config: RunConfig, memory: Memory | None = None) -> dict[str, Any]:
    """One run: read, evaluate, prune, write, load back, evaluate again. Returns the report that stands in the output directory.

    Args:
      memory: of the other runs of this process, where it is one of a sweep's trials; no result depends on it.
    """
    clock = Clock("load", "calibrate_and_prune", "eval", "export")
    method, request = request_of(config)
    output = output_path(config.output)
    inputs = read_inputs(config, method, request, memory or Memory(0))
    checkpoint, tokenizer, calibration, data, zero_shot = inputs
    model = checkpoint.model
    clock.lap("load")
    journal: Journal | None = None

    def begun() -> bool:
        return journal.finished > EVALUATED if journal else (directory / UNFINISHED / "journal").is_dir()  # of a refused run

    def tasks_of(which: Checkpoint) -> Results:
        return evaluate_tasks(zero_shot, which, config.calibration_batch, request.mesh, config.task_cache)

    with staged(output, export.REPORT, config.resume, begun) as directory:
        work = directory / UNFINISHED
        writer = Writer(directory, checkpoint.config, config.layout, work=work / "blocks")
        facts = fingerprint(config, inputs)
        common = json.dumps({name: fact for name, fact in facts.items() if name not in VARIED})
        journal = Journal(work / "journal", facts, writer, memory, common)
        if went_on := journal.finished > EVALUATED:
            console.note(f"going on with an interrupted run, {writer.blocks} blocks are finished (--noresume begins anew)")
        clock.lap("load")
        dense = journal.step(lambda: evaluate(model, data, config.calibration_batch, request.mesh), "dense")
        dense_tasks = journal.step(lambda: tasks_of(checkpoint), "dense tasks") if zero_shot else {}
        clock.lap("eval")
        echo = export.Echo(model, writer)
        with console.progress() as stage:
            tier = tier_for(config.activations, model, calibration.ids, request.mesh)
            request = dataclasses.replace(request, tier=tier, stage=stage, journal=journal)
            outcome = method(model, calibration.ids, request, echo.put)
        clock.lap("calibrate_and_prune")
        form = writer.finish(model.ends, checkpoint.directory, outcome.kept_blocks)
        written = export.load_back(directory, form, echo, DTYPES[config.dtype], writer.parameters)
        counts = count(checkpoint, measure(written.loaded.model), outcome.kept_blocks)
        write_json(directory / "pruning.json", export.pruning_record(checkpoint, outcome, counts.gone))
        clock.lap("export")
        pruned = evaluate(written.loaded.model, data, config.calibration_batch, request.mesh)
        tasks = {name: {"dense": dense_tasks[name], "pruned": figures} for name, figures in tasks_of(written.loaded).items()}
        clock.lap("eval")
        target = next(iter(outcome.asked[0].values())) if method.counts else request.sparsity
        run = Finished(checkpoint, calibration, data, target, outcome, written, dense, pruned, zero_shot, tasks)
        result = describe(config, run, counts, writer.parameters)
        # After the peak memory was read: samples hold whole models.
        result |= {"samples": samples(checkpoint, written.loaded, tokenizer)}
        clock.lap("eval")
        result |= {"seconds": clock.seconds}
        result["warnings"] += ["the run was interrupted: its seconds are those since it went on"] * went_on
        result["warnings"] += [SHARED] * (memory is not None)
        write_json(directory / export.REPORT, result)
        report.write_html(result, directory / "report.html")
    return result


def command(config: RunConfig) -> str:
    """The command that repeats the run."""
    f = options()
    given = f.given({flag.name: getattr(config, flag.name) for flag in dataclasses.fields(config)})
    return shlex.join(["python", "-m", "launch.prune", *given])


def main(values: dict[str, Any]) -> None:
    """Run, then show the closing table."""
    result = prune(frozen(RunConfig, values))
    if jax.process_index() == 0:
        console.show(result, Console())


if __name__ == "__main__":
    sys.exit(cli.run(options(), main))
