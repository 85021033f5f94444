"""--calibration_draws: a run repeated on other calibration windows, for the spread that they alone give its figures."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from calibration.data import Tokens, taken_whole
from calibration.journal import Journal
from calibration.runtime import Runtime
from launch.report import console
from models.checkpoint.output_format import Layout
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.checkpoint.writer import Writer
from models.errors import InputError
from models.processes import run_on_primary
from pruning.types import Method, Request


def check_draws(count: int, source: str) -> None:
    """InputError for more than one draw from a source that is not drawn from."""
    if count > 1 and taken_whole(source):
        raise InputError(
            f"--calibration_draws={count}: {source} is taken whole, so that every draw would be the same: "
            "leave it out, or give text to draw windows from"
        )


def check_different(draws: Sequence[Tokens], source: str) -> None:
    """InputError if two draws are the same windows, whose spread would say nothing."""
    if len({tokens.protocol["sha256"] for tokens in draws}) < len(draws):
        raise InputError(
            f"--calibration_draws={len(draws)}: {source} has too little text for so many different draws: give more of it, "
            "or lower --calibration_length"
        )


def prune_on(
    tokens: Tokens,
    checkpoint: Checkpoint,
    method: Method,
    request: Request,
    runtime: Runtime,
    place: pathlib.Path,
    facts: Mapping[str, Any],
    layout: Layout,
    measure: Callable[[Checkpoint], Mapping[str, Any]],
) -> dict[str, Any]:
    """What a run with these calibration windows, and the seed that drew them, gives: `record` of it.

    It holds no more memory than the run that it repeats: blocks go to files in `place` as they are finished, and are evaluated from there.

    Args:
      request: of the run that is repeated.
      place: a directory of this draw, which outlives an interruption: the draw goes on behind its last finished block.
      facts: the fingerprint of the run that is repeated.
      measure: a checkpoint -> what `launch.prune` measures of it.
    """
    model, seed = checkpoint.model, tokens.protocol["seed"]
    # What an interrupted run had begun to make of its blocks.
    run_on_primary(functools.partial(shutil.rmtree, place / "model", ignore_errors=True))
    writer = Writer(place / "model", checkpoint.config, layout, work=place / "blocks")
    journal = Journal(place / "journal", {**facts, "draw": tokens.protocol}, writer)
    with console.progress() as progress:

        def progress_of_draw(description: str, steps: int) -> Callable[[], None]:
            return progress(f"seed {seed}: {description}", steps)

        runtime = dataclasses.replace(runtime, journal=journal, progress=progress_of_draw)
        request = dataclasses.replace(request, seed=seed)
        outcome = method.run(model, tokens.ids, request, runtime, writer.put)
    writer.finish(model.non_block, checkpoint.directory, outcome.kept_blocks)
    return record(
        tokens, measure(open_checkpoint(place / "model", jnp.dtype(model.non_block.embed.dtype)))
    )


def record(tokens: Tokens, pruned: Mapping[str, Any]) -> dict[str, Any]:
    """What the report has of a draw: its seed, the SHA-256 of its tokens, and what was measured of the model pruned on it."""
    return {
        "seed": tokens.protocol["seed"],
        "sha256": tokens.protocol["sha256"],
        "perplexity": {name: found["perplexity"] for name, found in pruned["perplexity"].items()},
        "tasks": pruned["tasks"],
    }


def spread(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation, least and most over draws, of each perplexity and each metric: {"perplexity": {data set: ...},
    "tasks": {task: {metric: ...}}}. A perplexity that is not finite makes a mean that is not."""

    def of(values: Sequence[float]) -> dict[str, float]:
        x = np.asarray(values, np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            return {
                "mean": float(x.mean()),
                "std": float(x.std(ddof=1)),
                "min": float(x.min()),
                "max": float(x.max()),
            }

    first = draws[0]
    return {
        "perplexity": {
            name: of([d["perplexity"][name] for d in draws]) for name in first["perplexity"]
        },
        "tasks": {
            task: {
                metric: of([d["tasks"][task][metric] for d in draws])
                for metric in metrics
                if not metric.partition(",")[0].endswith("_stderr")
            }
            for task, metrics in first["tasks"].items()
        },
    }
