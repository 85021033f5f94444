"""Settings of a run of launch.prune, and the job that they describe."""

import dataclasses
from typing import NamedTuple

from calibration.data import default_calibration
from calibration.mixtures import is_generated, parse_parts
from calibration.runtime import Runtime
from launch.flags import calls
from launch.flags.common import mesh_of
from launch.flags.numbers import check_sparsity
from launch.flags.recoveries import Call, parse_recover
from launch.flags.sources import check_draws, parse_calibration
from launch.targets.search import PROBES
from launch.targets.syntax import Target, parse_target
from models.arch import Model
from models.checkpoint.hub import at_revision
from models.checkpoint.output_format import Layout
from models.errors import InputError
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.types import Method, Request, reads_activations, scores_key
from pruning.weights.patterns import parse_pattern


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run; each attribute is the value of the flag with its name."""

    model: str | None
    revision: str
    method: str
    sparsity: float | None
    target: str
    pattern: str
    allocation: str
    refine: str
    recover: str
    protocol: str
    calibration: str
    calibration_samples: int
    calibration_length: int
    calibration_batch: int
    calibration_draws: int
    activations: str
    seed: int
    eval_data: str
    eval_length: int
    eval_windows: int
    output: str | None
    push_to_hub: str
    dtype: str
    matmul: str
    mesh: str
    layout: Layout
    output_format: str
    gguf_type: str
    pack: str
    check: str
    resume: bool
    scores: str
    tasks: str
    limit: int
    num_fewshot: int
    trust_task_files: bool
    task_cache: bool
    track: str


class CalibrationSource(NamedTuple):
    """Source of the calibration windows.

    Attributes:
      name: Data set, file, `self`, or a mix of these.
      samples: Number of windows.
      length: Tokens in a window; 0: the model's own length.
      seeds: Seed of each draw.
      reason: Why the source was chosen; empty if the user named it.
    """

    name: str
    samples: int
    length: int
    seeds: tuple[int, ...]
    reason: str

    @property
    def generated(self) -> bool:
        """Return True if the model writes windows itself."""
        return any(is_generated(part.source) for part in parse_parts(self.name))


class EvaluationSource(NamedTuple):
    """Source of the evaluation windows.

    Attributes:
      names: Data sets and files, separated by commas.
      length: Tokens in a window; 0: the model's own length.
      windows: Most windows of a data set; 0: all.
    """

    names: str
    length: int
    windows: int


class TaskSource(NamedTuple):
    """Zero-shot tasks to run.

    Attributes:
      names: Tasks and files, separated by commas.
      limit: Most documents of a task; 0: all.
      num_fewshot: Examples in a prompt; -1: the task's own number.
      trust_files: Whether to open YAML files, which can run code.
    """

    names: str
    limit: int
    num_fewshot: int
    trust_files: bool


class Sources(NamedTuple):
    """Everything that a run reads.

    Attributes:
      model: Checkpoint to prune, with its revision; None if it is not given.
      dtype: Type of the model in memory and in the output, or "auto".
      calibration: Calibration windows.
      evaluation: Evaluation windows.
      tasks: Zero-shot tasks.
    """

    model: str | None
    dtype: str
    calibration: CalibrationSource
    evaluation: EvaluationSource
    tasks: TaskSource


class Output(NamedTuple):
    """Place and form of the result.

    Attributes:
      directory: Directory to write; None if it is not given.
      layout: How blocks of different widths are written.
      format: "orbax" to write the pytrees too, "gguf" for a file for llama.cpp, else "hf".
      gguf_type: Type of the matrices in the GGUF file.
      pack: How to also store the weights without their zeros; "none" not to.
      check: What loads the checkpoint back and compares logits, one of CHECKS.
      resume: Whether to continue an interrupted run that left its work there.
    """

    directory: str | None
    layout: Layout
    format: str
    gguf_type: str
    pack: str
    check: str
    resume: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, resolved from its settings.

    Attributes:
      config: The settings, for the report and the command that repeats the run.
      method: The pruning method.
      request: What to remove.
      runtime: How the run executes; `offload` is chosen when the model's size is known.
      sources: What the run reads.
      output: Where the result goes.
      target: What the request's sparsity is to be found for; None where it is given.
      recoveries: Recoveries of the pruned model, in order.
    """

    config: RunConfig
    method: Method
    request: Request
    runtime: Runtime
    sources: Sources
    output: Output
    target: Target | None = None
    recoveries: tuple[Call, ...] = ()


def resolve(config: RunConfig) -> Job:
    """Build the job that the settings describe, without reading any input.

    Args:
      config: The settings.

    Raises:
      InputError: A setting is wrong, or two do not go together.
    """
    method = calls.build("method", config.method, METHODS)
    allocation = calls.build("allocation", config.allocation, ALLOCATIONS)
    refine = calls.build("refine", config.refine, REFINEMENTS)
    pattern = parse_pattern(config.pattern)
    sparsity = _sparsity(config, pattern, method)
    _check_scores(config, method)
    # Even budgets need no allocator.
    allocator = None if config.allocation == "uniform" else allocation
    request = Request(sparsity, pattern, allocator, refine, config.seed)
    sources = _sources(config, reads_activations(method, request))
    recoveries = parse_recover(config.recover, config.calibration_draws)
    check_draws(config.calibration_draws, sources.calibration.name)
    mesh = mesh_of(config.mesh, config.calibration_batch)
    runtime = Runtime(batch=config.calibration_batch, mesh=mesh)
    target = parse_target(config.target) if config.target else None
    return Job(config, method, request, runtime, sources, _output(config), target, recoveries)


def _output(config: RunConfig) -> Output:
    """Collect where the result goes and in which formats."""
    if config.gguf_type != "f16" and config.output_format != "gguf":
        raise InputError(
            "does nothing without `output_format`=gguf",
            "give both, or leave it out",
            field="gguf_type",
            value=config.gguf_type,
        )
    return Output(
        config.output,
        config.layout,
        config.output_format,
        config.gguf_type,
        config.pack,
        config.check,
        config.resume,
    )


def _sources(config: RunConfig, reads_calibration: bool) -> Sources:
    """Collect what the run reads; whether the result depends on calibration is given."""
    return Sources(
        at_revision(config.model, config.revision),
        config.dtype,
        _calibration_source(config, reads_calibration),
        EvaluationSource(config.eval_data, config.eval_length, config.eval_windows),
        TaskSource(config.tasks, config.limit, config.num_fewshot, config.trust_task_files),
    )


def _calibration_source(config: RunConfig, reads_calibration: bool) -> CalibrationSource:
    """Return the calibration source, chosen by the model and the method if the user named none."""
    name, reason = config.calibration, ""
    if not name:
        embedded = (config.model or "").startswith("embedded:")
        name, reason = default_calibration(embedded, reads_calibration)
    parse_calibration(name)
    seeds = tuple(config.seed + k for k in range(config.calibration_draws))
    return CalibrationSource(
        name, config.calibration_samples, config.calibration_length, seeds, reason
    )


def _sparsity(config: RunConfig, pattern: tuple[int, int] | None, method: Method) -> float:
    """Return the fraction to remove, which the flag, the pattern or the method sets."""
    sparsity = config.sparsity
    if config.target:
        _check_alone(config, method)
        return 0.0  # found when the model is known
    if pattern and config.allocation != "uniform":
        raise InputError(
            "sets the sparsity of every linear, and `allocation` spreads it",
            "leave one of them out",
            field="pattern",
            value=config.pattern,
        )
    if pattern:
        share = pattern[0] / pattern[1]
        if sparsity is not None and abs(sparsity - share) > 1e-9:
            raise InputError(
                f"contradicts `pattern`={config.pattern}, which removes {share:g}",
                "leave `sparsity` out",
                field="sparsity",
                value=sparsity,
            )
        sparsity = share
    if sparsity is None and method.sets_sparsity:
        sparsity = 0.0
    if sparsity is None:
        raise InputError(
            "is missing",
            "give the fraction to remove, such as 0.3, or a `target` such as params=100M",
            field="sparsity",
        )
    check_sparsity(sparsity)
    return sparsity


def _check_scores(config: RunConfig, method: Method) -> None:
    """Check that scores of an earlier run can serve the method."""
    if config.scores and scores_key(method) is None:
        raise InputError(
            f"is for methods that measure the dense model once, and {config.method} does not",
            "leave it out, or choose flap, llmrank, minitron, reap, two_ssp or "
            'wanda_sp(scope="global")',
            field="scores",
            value=config.scores,
        )


def _check_alone(config: RunConfig, method: Method) -> None:
    """Check that nothing but the target says how much to remove."""
    others = {
        "sparsity": config.sparsity is not None,
        "pattern": config.pattern != "unstructured",
        "method": method.sets_sparsity,
    }
    for field, given in others.items():
        if given:
            remedy = "leave one of them out"
            if field == "method":
                remedy = "leave its number of blocks out, or the target"
            raise InputError(
                f"contradicts `{field}`={getattr(config, field)}, which sets how much to remove",
                remedy,
                field="target",
                value=config.target,
            )


def check_method(job: Job, model: Model) -> None:
    """Check that a job's method can prune a model, at some sparsity where a target will set it.

    Args:
      job: The run.
      model: Only its architecture is read.

    Raises:
      InputError: It cannot.
    """
    if job.target is None:
        job.method.check(model, job.request)
        return
    refusals = []
    for sparsity in (*PROBES, job.request.sparsity):
        try:
            job.method.check(model, dataclasses.replace(job.request, sparsity=sparsity))
            return
        except InputError as e:
            refusals.append(e)
    raise refusals[-1]
