"""Open the model and read all tokens of a run."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from calibration.data import Tokens
from calibration.journal import StepCache
from calibration.tokenizer import TextTokenizer
from launch.flags.common import open_model
from launch.report import console
from launch.run.formats import check_formats
from launch.run.job import Job, check_method
from launch.run.measure import read_calibration, read_evaluation, tokenizer_of
from launch.run.recovery import check_chain
from launch.run.tasks import ZeroShot, read_tasks
from models.checkpoint.output_format import preview
from models.checkpoint.reader import Checkpoint
from models.errors import InputError


class Inputs(NamedTuple):
    """Everything that a run has read.

    Attributes:
      checkpoint: The dense model.
      tokenizer: Returns the model's tokenizer.
      calibration: Calibration windows of the first draw.
      further_draws: Calibration windows of the other draws.
      data: Evaluation windows by data set.
      zero_shot: Zero-shot tasks; None if the run has none.
    """

    checkpoint: Checkpoint
    tokenizer: Callable[[], TextTokenizer]
    calibration: Tokens
    further_draws: list[Tokens]
    data: dict[str, Tokens]
    zero_shot: ZeroShot | None


def read_inputs(job: Job, cache: StepCache) -> Inputs:
    """Open the model and read all tokens.

    Args:
      job: The run.
      cache: Keeps tokens for other runs of this process.

    Raises:
      InputError: An input cannot be read, or the method cannot prune this model.
    """
    sources = job.sources
    checkpoint = open_model(sources.model, sources.dtype)
    check_method(job, checkpoint.model)
    change = job.method.shape_change(checkpoint.model)
    if change.narrower and job.request.allocation:
        change = change._replace(alike=False)  # widths move between blocks
    form = preview(checkpoint.config, change, job.output.layout)
    check_formats(job.output, checkpoint)
    console.note(f"the result will load as {form}")
    tokenizer = tokenizer_of(checkpoint)
    draws, data = read_tokens(job, checkpoint, tokenizer, cache)
    check_chain(job.recoveries, checkpoint.model, change, len(draws[0].ids))
    zero_shot = read_tasks(*sources.tasks, checkpoint, tokenizer)
    return Inputs(checkpoint, tokenizer, draws[0], draws[1:], data, zero_shot)


def read_tokens(
    job: Job, checkpoint: Checkpoint, tokenizer: Callable[[], TextTokenizer], cache: StepCache
) -> tuple[list[Tokens], dict[str, Tokens]]:
    """Read the calibration windows of every draw, and the evaluation windows.

    Args:
      job: The run.
      checkpoint: The model.
      tokenizer: Returns the model's tokenizer.
      cache: Keeps tokens for other runs of this process.

    Returns:
      Calibration windows by draw, and evaluation windows by data set.

    Raises:
      InputError: A source cannot be read, or two draws are equal.
    """
    draws = read_draws(job, checkpoint, tokenizer, cache)
    return draws, read_data(job, checkpoint, tokenizer, cache)


def read_draws(
    job: Job, checkpoint: Checkpoint, tokenizer: Callable[[], TextTokenizer], cache: StepCache
) -> list[Tokens]:
    """Read the calibration windows of every draw.

    Args:
      job: The run.
      checkpoint: The model.
      tokenizer: Returns the model's tokenizer.
      cache: Keeps tokens for other runs of this process.

    Raises:
      InputError: A source cannot be read, or two draws are equal.
    """
    calibration, mesh = job.sources.calibration, job.runtime.mesh
    if calibration.reason:
        console.note(
            f"calibrating on {calibration.name}, {calibration.reason} (--calibration names another)"
        )
    draws = []
    for seed in calibration.seeds:
        source = (calibration.name, calibration.samples, calibration.length, seed)
        read_draw = functools.partial(read_calibration, *source, checkpoint, tokenizer, mesh)
        draws.append(cache.get_or_compute((job.sources.model, *source), read_draw))
    _check_different(draws, calibration.name)
    return draws


def read_data(
    job: Job, checkpoint: Checkpoint, tokenizer: Callable[[], TextTokenizer], cache: StepCache
) -> dict[str, Tokens]:
    """Read the evaluation windows.

    Args:
      job: The run.
      checkpoint: The model.
      tokenizer: Returns the model's tokenizer.
      cache: Keeps tokens for other runs of this process.

    Returns:
      Windows by data set.

    Raises:
      InputError: A source cannot be read.
    """
    evaluation = job.sources.evaluation
    read = functools.partial(read_evaluation, *evaluation, checkpoint, tokenizer)
    windows: dict[str, Tokens] = cache.get_or_compute((job.sources.model, *evaluation), read)
    return windows


def _check_different(draws: Sequence[Tokens], source: str) -> None:
    """Check that no two draws are the same windows: their spread would mean nothing."""
    if len({tokens.protocol["sha256"] for tokens in draws}) < len(draws):
        raise InputError(
            f"has equal draws: {source} has too little text for so many different draws",
            "give more text, or lower `calibration_length`",
            field="calibration_draws",
            value=len(draws),
        )
