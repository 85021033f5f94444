"""Continue an interrupted run: its fingerprint, its journal, and when its files are kept."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from calibration.digests import file_digest
from calibration.journal import Journal, StepCache
from launch.flags.dtypes import stored_dtype
from launch.report import console
from launch.run.code import code_digests
from launch.run.inputs import Inputs
from launch.run.job import Job
from launch.run.measure import protocol
from launch.run.scores import digest_of
from models.checkpoint.reader import Checkpoint, weight_files
from models.checkpoint.writer import Writer

JOURNAL = "journal"  # directory of the journal, below that of the unfinished run
BLOCKS = "blocks"  # directory of the finished blocks, beside it
# A journal's first step is the evaluation of the dense model. A run that has finished no more is
# not worth keeping.
WORTHLESS_STEPS = 1
# Facts that trials of one process may differ in and still share cached steps.
PER_TRIAL = (
    "--method",
    "code of --method",
    "--sparsity",
    "--target",
    "sparsity of --target",
    "--allocation",
    "code of --allocation",
    "--seed",
    "--calibration tokens",
    "further draws",
)
# Settings that the fingerprint leaves out: the inputs they name are compared by content, or they
# do not affect the result.
NOT_COMPARED = (
    "model",
    "revision",
    "output",
    "push_to_hub",
    "resume",
    "protocol",
    "calibration",
    "eval_data",
    "activations",
    "tasks",
    "task_cache",
    "track",
    "gguf_type",
    "pack",
    "check",
    "scores",
)


def fingerprint(job: Job, inputs: Inputs) -> dict[str, Any]:
    """Collect everything that a run's result depends on.

    An interrupted run continues only if its fingerprint is unchanged.

    Args:
      job: The run.
      inputs: What it has read.

    Returns:
      JSON-able facts, by a name that users know.
    """
    settings = dataclasses.asdict(job.config)
    compared = {f"--{name}": v for name, v in settings.items() if name not in NOT_COMPARED}
    used = protocol({}, inputs.zero_shot)
    weights = weight_files(inputs.checkpoint.directory)
    advance = job.runtime.progress("hashing the weights", len(weights), unit="files")
    digests = {}
    for path in weights:
        digests[path.name] = file_digest(path)
        advance()
    return {
        "model configuration": inputs.checkpoint.config,
        "weights": digests,
        "--calibration tokens": inputs.calibration.protocol["sha256"],
        "--scores": digest_of(job.config.scores),
        "further draws": [tokens.protocol["sha256"] for tokens in inputs.further_draws],
        "--eval_data tokens": {name: t.protocol["sha256"] for name, t in inputs.data.items()},
        "--tasks requests": inputs.zero_shot.protocol if inputs.zero_shot else {},
        **compared,
        "sparsity of --target": job.request.sparsity if job.target else None,
        **code_digests(job.config),
        **{f"version of {name}": value for name, value in used["versions"].items()},
        **{f"device {name}": value for name, value in used["device"].items()},
    }


def open_writer(
    directory: pathlib.Path, work: pathlib.Path, job: Job, checkpoint: Checkpoint
) -> Writer:
    """Open the writer of a pruned checkpoint, in the type that the run stores.

    Args:
      directory: Directory of the checkpoint.
      work: Directory of the unfinished run.
      job: The run.
      checkpoint: The dense checkpoint.
    """
    dtype = stored_dtype(job.sources.dtype, checkpoint)
    layout = job.output.layout
    return Writer(directory, checkpoint.config, layout, work=work / BLOCKS, dtype=dtype)


def open_journal(
    directory: pathlib.Path, facts: Mapping[str, Any], writer: Writer, cache: StepCache | None
) -> Journal:
    """Open the journal of a run, or begin one; say which of its files are damaged.

    Args:
      directory: The journal's directory.
      facts: The run's fingerprint.
      writer: Sink of the finished blocks.
      cache: Shared with the other runs of this process; runs use each other's steps if they differ
        in the facts of PER_TRIAL alone.

    Raises:
      InputError: The directory belongs to a different run.
    """
    journal = Journal(directory, facts, writer, cache, shared_context(facts))
    for sentence in journal.damage:
        console.note(f"warning: unfinished run: {sentence}")
    return journal


def shared_context(facts: Mapping[str, Any]) -> str:
    """Return what runs of one process have in common that use each other's results.

    Args:
      facts: A run's fingerprint.
    """
    return json.dumps({name: fact for name, fact in facts.items() if name not in PER_TRIAL})


class Attempt:
    """One start of a run, which decides whether a failure keeps the unfinished work.

    Attributes:
      journal: The run's journal; None until it is open.
    """

    def __init__(self) -> None:
        self.journal: Journal | None = None

    @property
    def resumed(self) -> bool:
        """Return True if the journal has work that is worth keeping."""
        return self.journal is not None and self.journal.finished > WORTHLESS_STEPS

    def keeps(self, work: pathlib.Path) -> bool:
        """Return True if the unfinished work is to be kept for the next start.

        Args:
          work: Directory of the unfinished work.
        """
        if self.journal is None:
            # The run was refused before it began: the work is that of the run before.
            return (work / JOURNAL).is_dir()
        return self.resumed
