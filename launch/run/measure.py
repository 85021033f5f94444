"""Measure models and time phases, for several commands; record versions and devices."""

import functools
import importlib.metadata
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from calibration.data import Tokens, calibration_tokens, evaluation_tokens, is_token_file
from calibration.generated import generated_windows
from calibration.mixtures import is_generated, mixed_windows
from calibration.tokenizer import TextTokenizer, Tokenizer, load_tokenizer
from eval.perplexity import perplexity
from launch import __version__
from launch.flags.common import check_length, dataset_list, window_length
from launch.flags.sources import parse_calibration, self_settings
from launch.report import console
from launch.report.progress import progress
from launch.run.tasks import ZeroShot, evaluate_tasks
from models.arch import Model
from models.checkpoint import hub
from models.checkpoint.hub_client import source_of
from models.checkpoint.reader import Checkpoint
from models.checkpoint.widths import with_few_widths
from models.checkpoint.writer import write_json
from models.errors import InputError
from models.progress import Progress, no_progress
from models.untrusted import user_path

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "datasets",
)

Visit = Callable[[jax.Array], None]  # gets the last hidden states of a micro-batch, [b t d]
NO_VISITS: Mapping[str, Visit] = {}


class Clock:
    """Seconds spent in each phase of a command.

    Args:
      phases: Names of the phases.

    Attributes:
      seconds: Seconds by phase.
    """

    def __init__(self, *phases: str) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)
        self._last = time.perf_counter()

    def record(self, phase: str) -> None:
        """Add the time since the last call, or the start, to a phase.

        Args:
          phase: The phase that has just ended.
        """
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def tokenizer_of(checkpoint: Checkpoint) -> Callable[[], TextTokenizer]:
    """Return a function that loads the checkpoint's tokenizer once, when it is first needed.

    Args:
      checkpoint: The checkpoint; with token files alone it needs no tokenizer.
    """
    return functools.cache(lambda: load_tokenizer(checkpoint.directory))


def read_calibration(
    name: str,
    samples: int,
    length: int,
    seed: int,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], Tokenizer],
    mesh: Mesh | None = None,
) -> Tokens:
    """Read calibration windows.

    Args:
      name: Data set, file, `self`, or a mix of these.
      samples: Number of windows.
      length: Tokens in a window; 0: the model's own length.
      seed: Seed of the windows.
      checkpoint: The model.
      tokenizer: Returns the model's tokenizer.
      mesh: Devices for a model that writes windows itself; None: one.

    Raises:
      InputError: The source cannot be read, or has longer windows than the model has positions.
    """
    length = window_length(length, checkpoint.config)

    def read(source: str, count: int) -> Tokens:
        options = {"samples": count, "length": length, "seed": seed}
        if is_generated(source):
            with progress() as shown:
                settings = self_settings(source)
                tokens = generated_windows(
                    settings, checkpoint, tokenizer, **options, mesh=mesh, progress=shown
                )
            return tokens._replace(protocol=tokens.protocol | {"source": source})
        _note_reading("calibration", source)
        vocab = checkpoint.model.arch.config.vocab
        return calibration_tokens(source, tokenizer, **options, vocab=vocab)

    parts = parse_calibration(name)
    tokens = mixed_windows(parts, read, samples=samples, length=length, seed=seed)
    if "parts" in tokens.protocol:
        counts = [f"{part['windows']} of {part['source']}" for part in tokens.protocol["parts"]]
        console.note(f"calibration windows: {', '.join(counts)}")
    for warning in tokens.warnings:
        console.note(f"warning: {warning}")
    check_length("calibration", tokens.ids.shape[1], checkpoint)
    return tokens


def read_evaluation(
    names: str,
    length: int,
    windows: int,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], Tokenizer],
) -> dict[str, Tokens]:
    """Read evaluation windows.

    Args:
      names: Data sets and files, separated by commas.
      length: Tokens in a window; 0: the model's own length.
      windows: Most windows of a data set; 0: all.
      checkpoint: The model.
      tokenizer: Returns the model's tokenizer.

    Returns:
      Windows by the name of the data set as given.

    Raises:
      InputError: A source cannot be read, or has longer windows than the model has positions.
    """
    data = {}
    if "embedded" in dataset_list(names) and not hub.is_embedded(checkpoint.directory):
        console.note(
            "the embedded evaluation text is generated stories: --eval_data=wikitext2 or a file "
            "gives a perplexity to compare with others"
        )
    for name in dataset_list(names):
        _note_reading("evaluation", name)
        tokens = evaluation_tokens(
            name,
            tokenizer,
            length=window_length(length, checkpoint.config),
            windows=windows,
            vocab=checkpoint.model.arch.config.vocab,
        )
        check_length("eval_data", tokens.ids.shape[1], checkpoint)
        data[name] = tokens
    return data


def _note_reading(purpose: str, name: str) -> None:
    """Print that texts are read, which takes minutes where they are downloaded and tokenized."""
    if not is_token_file(name):
        console.note(f"reading texts for {purpose}: {name}")


def evaluate(
    model: Model,
    data: Mapping[str, Tokens],
    batch: int,
    mesh: Mesh | None,
    progress: Progress = no_progress,
    visits: Mapping[str, Visit] = NO_VISITS,
) -> dict[str, dict[str, Any]]:
    """Measure perplexity on each data set.

    Args:
      model: The model.
      data: Windows by data set.
      batch: Windows at a time.
      mesh: Devices; None: one.
      progress: Shows the progress.
      visits: By data set, what else looks at the last hidden states of each micro-batch.

    Returns:
      By data set: "perplexity", its standard error over windows as "error", and "tokens".
    """
    results = {}
    for name, tokens in data.items():
        what = f"perplexity on {name}"
        p = perplexity(
            model,
            tokens.ids,
            batch=batch,
            mesh=mesh,
            progress=progress,
            name=what,
            visit=visits.get(name),
        )
        results[name] = {"perplexity": p.value, "error": p.error, "tokens": p.tokens}
    return results


def measure_checkpoint(
    checkpoint: Checkpoint,
    data: Mapping[str, Tokens],
    zero_shot: ZeroShot | None,
    batch: int,
    mesh: Mesh | None,
    task_cache: bool,
    progress: Progress = no_progress,
    visits: Mapping[str, Visit] = NO_VISITS,
) -> dict[str, Any]:
    """Measure perplexity and zero-shot tasks of a checkpoint.

    Args:
      checkpoint: The checkpoint.
      data: Evaluation windows by data set.
      zero_shot: Zero-shot tasks; None for none.
      batch: Windows, or requests of a task, at a time.
      mesh: Devices; None: one.
      task_cache: Whether to use and keep the model's answers to tasks.
      progress: Shows the progress.
      visits: As for `evaluate`.

    Returns:
      "perplexity" as `evaluate` returns it, and "tasks" as `evaluate_tasks` does.
    """
    # Every text has a length of its own, and each is compiled for every shape of a block.
    checkpoint = checkpoint._replace(model=with_few_widths(checkpoint.model))
    tasks = evaluate_tasks(zero_shot, checkpoint, batch, mesh, task_cache, progress)
    scores = evaluate(checkpoint.model, data, batch, mesh, progress, visits)
    return {"perplexity": scores, "tasks": tasks}


def protocol(data: Mapping[str, Tokens], zero_shot: ZeroShot | None = None) -> dict[str, Any]:
    """Return what the report's `protocol` says about evaluation, versions and devices.

    Args:
      data: Evaluation windows by data set.
      zero_shot: Zero-shot tasks; None for none.
    """
    device = jax.devices()[0]
    result: dict[str, Any] = {"evaluation": {name: t.protocol for name, t in data.items()}}
    if zero_shot:
        result["tasks"] = zero_shot.protocol
    versions = {"topiary": __version__, "python": platform.python_version()}
    result["versions"] = versions | {p: importlib.metadata.version(p) for p in PACKAGES}
    result["device"] = {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
    }
    return result


def model_origin(path: pathlib.Path) -> dict[str, Any]:
    """Return what the report's `protocol` says about a model's origin.

    Args:
      path: Directory or file of the model.

    Returns:
      "model" with the "repository" of the hub and the "commit"; empty for any other model.
    """
    source = source_of(path)
    return {"model": source._asdict()} if source else {}


def write_report(path: str, report: Mapping[str, Any]) -> None:
    """Write a report to the file that --json names.

    Args:
      path: The flag's value.
      report: The report, JSON-able.

    Raises:
      InputError: The file cannot be written.
    """
    try:
        write_json(user_path(path, "json"), report)
    except OSError as e:
        raise InputError(
            f"cannot be written ({e.strerror})", "choose another place", field="json", value=path
        ) from None
