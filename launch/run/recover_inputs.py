"""Read everything that launch.recover needs: both models, the windows, an earlier report."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from calibration.data import Tokens, default_calibration
from calibration.digests import file_digest
from launch.flags.common import mesh_of, open_model
from launch.flags.recoveries import Call
from launch.report import console
from launch.run import recovery
from launch.run.agreement import DenseStates
from launch.run.code import package_digests
from launch.run.comparisons import Comparisons
from launch.run.finished import Finished, read_finished
from launch.run.measure import protocol, read_calibration, read_evaluation, tokenizer_of
from launch.run.tasks import read_tasks
from models.checkpoint.hub import is_embedded
from models.checkpoint.output_format import Layout
from models.checkpoint.reader import Checkpoint, weight_files
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class RecoverConfig:
    """All settings of a run; each attribute is the value of the flag with its name."""

    model: str | None
    revision: str
    teacher: str | None
    recover: str
    dtype: str
    matmul: str
    mesh: str
    calibration: str
    calibration_samples: int
    calibration_length: int
    calibration_batch: int
    activations: str
    seed: int
    eval_data: str
    eval_length: int
    eval_windows: int
    tasks: str
    limit: int
    num_fewshot: int
    trust_task_files: bool
    task_cache: bool
    output: str | None
    layout: Layout
    output_format: str
    gguf_type: str
    pack: str
    check: str
    resume: bool


# Settings that do not affect the result, or name inputs that are compared by content.
NOT_COMPARED = (
    *("model", "revision", "teacher", "calibration", "activations", "eval_data", "tasks"),
    *("task_cache", "output", "resume", "gguf_type", "pack", "check"),
)


class Inputs(NamedTuple):
    """Everything that a run has read.

    Attributes:
      pruned: The pruned model.
      dense: The teacher.
      finished: The pruned model's report and blocks.
      source: Source of the calibration windows.
      calibration: Calibration windows.
      comparisons: Measurements of all models.
      mesh: Devices; None: one.
    """

    pruned: Checkpoint
    dense: Checkpoint
    finished: Finished
    source: str
    calibration: Tokens
    comparisons: Comparisons
    mesh: Mesh | None


def read_inputs(config: RecoverConfig, chain: Sequence[Call]) -> Inputs:
    """Open both models and read all tokens.

    Args:
      config: Settings of the run.
      chain: The recoveries.

    Raises:
      InputError: An input cannot be read, or a recovery cannot be done.
    """
    pruned = open_model(config.model, config.dtype, config.revision)
    if not config.teacher:
        raise InputError("is missing", "give the dense model", field="teacher")
    dense = open_model(config.teacher, config.dtype)
    finished = read_finished(pruned, dense)
    mesh = mesh_of(config.mesh, config.calibration_batch)
    source = config.calibration
    if not source:
        source, reason = default_calibration(is_embedded(dense.directory), True)
        console.note(f"calibrating on {source}, {reason} (--calibration names another)")
    tokenizer = tokenizer_of(dense)
    drawn = (config.calibration_samples, config.calibration_length, config.seed)
    calibration = read_calibration(source, *drawn, dense, tokenizer, mesh)
    change = recovery.change_of(pruned, dense)
    recovery.check_chain(chain, dense.model, change, len(calibration.ids))
    evaluation = (config.eval_data, config.eval_length, config.eval_windows)
    data = read_evaluation(*evaluation, dense, tokenizer)
    tasks = (config.tasks, config.limit, config.num_fewshot, config.trust_task_files)
    zero_shot = read_tasks(*tasks, dense, tokenizer)
    states = DenseStates(dense.model, data, config.calibration_batch, mesh)
    batch = config.calibration_batch
    comparisons = Comparisons(dense, states, data, zero_shot, batch, mesh, config.task_cache)
    return Inputs(pruned, dense, finished, source, calibration, comparisons, mesh)


def fingerprint(config: RecoverConfig, inputs: Inputs) -> dict[str, Any]:
    """Collect everything that a run's result depends on, by a name that users know.

    Args:
      config: Settings of the run.
      inputs: What it has read.
    """
    settings = dataclasses.asdict(config)
    data, zero_shot = inputs.comparisons.data, inputs.comparisons.zero_shot
    used = protocol({}, zero_shot)
    models = {"weights": inputs.pruned, "weights of --teacher": inputs.dense}
    return {
        **{
            name: {path.name: file_digest(path) for path in weight_files(checkpoint.directory)}
            for name, checkpoint in models.items()
        },
        "--calibration tokens": inputs.calibration.protocol["sha256"],
        "--eval_data tokens": {name: t.protocol["sha256"] for name, t in data.items()},
        "--tasks requests": zero_shot.protocol if zero_shot else {},
        **{f"--{name}": v for name, v in settings.items() if name not in NOT_COMPARED},
        **package_digests(),
        **{f"version of {name}": value for name, value in used["versions"].items()},
        **{f"device {name}": value for name, value in used["device"].items()},
    }
