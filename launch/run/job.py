"""What a run of launch.prune depends on, and what that asks of a method."""

import dataclasses

from calibration.runtime import Runtime
from launch.flags import calls
from launch.flags.common import check_sparsity, mesh_of
from launch.run import draws
from models.checkpoint.output_format import Layout
from models.errors import InputError
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.types import Method, Request
from pruning.weights.patterns import parse_pattern


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on, as the flags of the same names say."""

    model: str | None
    method: str
    sparsity: float | None
    pattern: str
    allocation: str
    refine: str
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
    dtype: str
    mesh: str
    layout: Layout
    output_format: str
    resume: bool
    tasks: str
    limit: int
    num_fewshot: int
    task_cache: bool


def request_of(config: RunConfig) -> tuple[Method, Request, Runtime]:
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
    if sparsity is None and method.sets_sparsity:
        sparsity = 0.0
    if sparsity is None:
        raise InputError("--sparsity is missing: give the fraction to remove, such as 0.3")
    check_sparsity(sparsity)
    draws.check_draws(config.calibration_draws, config.calibration)
    request = Request(
        sparsity,
        pattern,
        None if config.allocation == "uniform" else allocation,
        refine,
        config.seed,
    )
    mesh = mesh_of(config.mesh, config.calibration_batch)
    return method, request, Runtime(batch=config.calibration_batch, mesh=mesh)
