"""What commands measure and stamp: evaluation windows and perplexity, seconds by phase, versions and devices."""

import functools
import importlib.metadata
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from calibration.data import Tokens, calibration_tokens, evaluation_tokens
from calibration.tokenizer import TextTokenizer, Tokenizer, load_tokenizer
from eval.perplexity import perplexity
from launch import __version__
from launch.flags.common import check_length, dataset_list, window_length
from launch.run.tasks import ZeroShot
from models.arch import Model
from models.checkpoint.reader import Checkpoint
from models.checkpoint.writer import write_json
from models.errors import InputError

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


class Clock:
    """Seconds spent by phase."""

    def __init__(self, *phases: str) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Give the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def tokenizer_of(checkpoint: Checkpoint) -> Callable[[], TextTokenizer]:
    """The checkpoint's tokenizer, read when it is first asked for: token files need none."""
    return functools.cache(lambda: load_tokenizer(checkpoint.directory))


def read_calibration(
    name: str,
    samples: int,
    length: int,
    seed: int,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], Tokenizer],
) -> Tokens:
    """The calibration windows; InputError for what cannot be read, or is longer than the model has positions for.

    Args:
      name: of the source, as --calibration has it.
      length: of a window; 0 for what the model was made for.
    """
    length, vocab = window_length(length, checkpoint.config), checkpoint.model.arch.config.vocab
    tokens = calibration_tokens(
        name, tokenizer, samples=samples, length=length, seed=seed, vocab=vocab
    )
    check_length("--calibration", tokens.ids.shape[1], checkpoint)
    return tokens


def read_evaluation(
    names: str,
    length: int,
    windows: int,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], Tokenizer],
) -> dict[str, Tokens]:
    """Windows of every data set of a comma-separated list, by the name as given; InputError for what cannot be read or is too long.

    Args:
      length: of a window; 0 for what the model was made for.
      windows: most of them; 0 for all.
    """
    found, length = {}, window_length(length, checkpoint.config)
    for name in dataset_list(names):
        found[name] = evaluation_tokens(
            name,
            tokenizer,
            length=length,
            windows=windows,
            vocab=checkpoint.model.arch.config.vocab,
        )
        check_length("--eval_data", found[name].ids.shape[1], checkpoint)
    return found


def evaluate(
    model: Model, data: Mapping[str, Tokens], batch: int, mesh: Mesh | None
) -> dict[str, dict[str, Any]]:
    """{data set: {"perplexity", "error": its standard error over windows, or None, "tokens"}} of a model."""
    found = {
        name: perplexity(model, tokens.ids, batch=batch, mesh=mesh) for name, tokens in data.items()
    }
    return {
        name: {"perplexity": p.value, "error": p.error, "tokens": p.tokens}
        for name, p in found.items()
    }


def protocol(data: Mapping[str, Tokens], zero_shot: ZeroShot | None = None) -> dict[str, Any]:
    """Where the evaluation's tokens and tasks came from, and what ran."""
    device = jax.devices()[0]
    versions = {"topiary": __version__, "python": platform.python_version()}
    return {
        "evaluation": {name: tokens.protocol for name, tokens in data.items()},
        **({"tasks": zero_shot.protocol} if zero_shot else {}),
        "versions": versions | {p: importlib.metadata.version(p) for p in PACKAGES},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
    }


def write_report(path: str, result: Mapping[str, Any]) -> None:
    """Write a report where `--json` says; InputError if that place cannot be written."""
    try:
        write_json(pathlib.Path(path), result)
    except OSError as e:
        raise InputError(
            f"--json={path} cannot be written ({e.strerror}): choose another place"
        ) from None
