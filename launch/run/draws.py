"""Repeat a run on other calibration windows, and report the spread of its results."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from calibration.data import Tokens
from calibration.journal import Journal
from calibration.runtime import Runtime
from launch.report.progress import prefixed
from launch.run.job import Job
from launch.run.resume import JOURNAL, open_journal, open_writer
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.processes import run_on_primary
from models.progress import Progress


class Repetition(NamedTuple):
    """Everything that the further draws of a run have in common.

    Attributes:
      job: The run.
      checkpoint: The dense model.
      runtime: How the run executes.
      facts: The run's fingerprint.
      directory: Directory for the draws' files.
      measure: Measures a checkpoint as the run does, and shows its progress.
      damage: Sentences about damaged files of interrupted draws, added to as they are found.
    """

    job: Job
    checkpoint: Checkpoint
    runtime: Runtime
    facts: Mapping[str, Any]
    directory: pathlib.Path
    measure: Callable[[Checkpoint, Progress], Mapping[str, Any]]
    damage: list[str]

    def directory_of(self, tokens: Tokens) -> pathlib.Path:
        """Return the directory of one draw.

        Args:
          tokens: Calibration windows of the draw.
        """
        return self.directory / f"draw-{tokens.protocol['seed']}"


def prune_draws(
    draws: Sequence[Tokens], repetition: Repetition, journal: Journal
) -> list[dict[str, Any]]:
    """Repeat a run on each draw, as a step of its journal.

    Args:
      draws: Calibration windows of each draw.
      repetition: What the draws have in common.
      journal: The run's journal.

    Returns:
      `record` of each draw.
    """
    records = []
    for tokens in draws:
        records.append(journal.step(functools.partial(prune_draw, tokens, repetition)))
        # The figures are in the journal: the model itself is not kept.
        directory = repetition.directory_of(tokens)
        run_on_primary(functools.partial(shutil.rmtree, directory, ignore_errors=True))
    return records


def prune_draw(tokens: Tokens, repetition: Repetition) -> dict[str, Any]:
    """Prune and measure the model on other calibration windows, with the seed that drew them.

    Blocks go to files as they are finished and are evaluated from there, so that a draw takes no
    more memory than the run. An interrupted draw continues behind its last finished block.

    Args:
      tokens: Calibration windows.
      repetition: What the draws have in common.

    Returns:
      `record` of the draw.
    """
    model, seed = repetition.checkpoint.model, tokens.protocol["seed"]
    directory = repetition.directory_of(tokens)
    output = directory / "model"
    # An interrupted draw may have begun to write the model; its finished blocks lie elsewhere.
    run_on_primary(functools.partial(shutil.rmtree, output, ignore_errors=True))
    job = repetition.job
    writer = open_writer(output, directory, job, repetition.checkpoint)
    facts = {**repetition.facts, "draw": tokens.protocol}
    journal = open_journal(directory / JOURNAL, facts, writer, None)
    repetition.damage.extend(f"seed {seed}: {sentence}" for sentence in journal.damage)
    progress = prefixed(repetition.runtime.progress, f"seed {seed}: ")
    runtime = dataclasses.replace(repetition.runtime, journal=journal, progress=progress)
    request = dataclasses.replace(job.request, seed=seed)
    outcome = job.method.run(model, tokens.ids, request, runtime, writer.put)
    non_block = outcome.non_block or model.non_block
    writer.finish(non_block, repetition.checkpoint.directory, outcome.kept_blocks)
    pruned = open_checkpoint(output, jnp.dtype(model.non_block.embed.dtype))
    return record(tokens, repetition.measure(pruned, progress))


def record(tokens: Tokens, pruned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report's entry for a draw.

    Args:
      tokens: Calibration windows of the draw.
      pruned: Measurements of the model pruned on them.

    Returns:
      The seed, the SHA-256 of the tokens, perplexity and agreement with the dense model by data
      set, and metrics by task.
    """
    perplexity = pruned["perplexity"]
    return {
        "seed": tokens.protocol["seed"],
        "sha256": tokens.protocol["sha256"],
        "perplexity": {name: figures["perplexity"] for name, figures in perplexity.items()},
        "agreement": pruned["agreement"],
        "tasks": pruned["tasks"],
    }


def spread(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise each perplexity, each agreement and each metric over the draws.

    Args:
      draws: `record` of every draw.

    Returns:
      Mean, sample standard deviation, least and greatest value: {"perplexity": {data set: ...},
      "agreement": {data set: {measure: ...}}, "tasks": {task: {metric: ...}}}. A value
      that is not finite makes its mean not finite.
    """
    first = draws[0]
    perplexity = {
        name: _summarise([d["perplexity"][name] for d in draws]) for name in first["perplexity"]
    }
    further = {}
    for part in ("agreement", "tasks"):
        further[part] = {
            name: {
                m: _summarise([d[part][name][m] for d in draws])
                for m in measured
                # The standard errors over windows or documents are none of the draws' figures.
                if not m.partition(",")[0].endswith("_stderr")
            }
            for name, measured in first[part].items()
        }
    return {"perplexity": perplexity, **further}


def _summarise(values: Sequence[float]) -> dict[str, float]:
    """Return mean, sample standard deviation, least and greatest value."""
    x = np.asarray(values, np.float64)
    # Infinite perplexities of collapsed models are figures too.
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            "mean": float(x.mean()),
            "std": float(x.std(ddof=1)),
            "min": float(x.min()),
            "max": float(x.max()),
        }
