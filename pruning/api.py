"""The public API: open a model, prune it, measure it, save it."""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from calibration.data import (
    Tokens,
    calibration_tokens,
    default_calibration,
    evaluation_tokens,
)
from calibration.generated import SelfText, generated_windows, self_text
from calibration.mixtures import SELF, is_generated, mixed_windows, parse_parts
from calibration.runtime import Runtime
from calibration.tokenizer import TextTokenizer, load_tokenizer
from eval.perplexity import perplexity as window_perplexity
from eval.size import measure_size
from models.arch import Model
from models.checkpoint.hub import is_embedded, resolve
from models.checkpoint.reader import Checkpoint, open_checkpoint
from models.checkpoint.writer import Writer
from models.errors import InputError
from pruning import types
from pruning.methods import METHODS
from pruning.types import Allocator, Method, Outcome, Refiner, Request


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with the checkpoint that it comes from.

    Attributes:
      model: Architecture and parameters; blocks are read from the checkpoint when they are indexed,
        or lie in memory after pruning.
      checkpoint: The dense checkpoint: configuration, tokenizer, directory.
      outcome: What was removed; None for a dense model.
    """

    model: Model
    checkpoint: Checkpoint
    outcome: Outcome | None = None

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        if self.outcome is None:
            return self.checkpoint.parameters
        return measure_size(self.model).parameters

    def _tokenizer(self) -> Callable[[], TextTokenizer]:
        return functools.partial(load_tokenizer, self.checkpoint.directory)


def open_model(name: str, dtype: str = "float32") -> LanguageModel:
    """Open a model; weights are read when they are needed.

    Args:
      name: A Hugging Face directory, a hub id, a `.gguf` file, or `embedded:tiny-llama`,
        `embedded:tiny-opt`.
      dtype: Type of the parameters in memory: "float32", "bfloat16" or "float16".

    Raises:
      InputError: There is no such model, or it cannot be read.
    """
    checkpoint = open_checkpoint(resolve(name), jnp.dtype(dtype))
    return LanguageModel(checkpoint.model, checkpoint)


def _read_windows(
    model: LanguageModel,
    calibration: str | SelfText,
    samples: int,
    length: int,
    seed: int,
    runtime: Runtime,
) -> np.ndarray:
    """Read calibration windows int32 [samples length], or let the model write them."""
    tokenizer, vocab = model._tokenizer(), model.model.arch.config.vocab

    def read(source: str, count: int) -> Tokens:
        options: dict[str, Any] = {"samples": count, "length": length, "seed": seed}
        if not is_generated(source):
            return calibration_tokens(source, tokenizer, **options, vocab=vocab)
        if source != SELF:
            raise InputError(
                "has settings", "give `pruning.self_text(...)`", field="calibration", value=source
            )
        settings = calibration if isinstance(calibration, SelfText) else self_text()
        options |= {"mesh": runtime.mesh, "progress": runtime.progress}
        return generated_windows(settings, model.checkpoint, tokenizer, **options)

    parts = parse_parts(SELF if isinstance(calibration, SelfText) else calibration)
    return mixed_windows(parts, read, samples=samples, length=length, seed=seed).ids


def prune(
    model: LanguageModel,
    method: str | Method,
    calibration: str | np.ndarray | SelfText | None = None,
    *,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    allocation: Allocator | None = None,
    refine: Refiner | None = None,
    samples: int = 32,
    length: int = 256,
    seed: int = 0,
    runtime: Runtime = Runtime(),  # noqa: B008, frozen
) -> LanguageModel:
    """Prune a model in memory.

    Args:
      model: The dense model, never changed.
      method: Name of a method with its default settings, or a method such as
        `pruning.flap(structure="AL-AM")`.
      calibration: Source of the calibration text or a mix, as `--calibration` names them; settings
        of text that the model writes itself, such as `pruning.self_text(temperature=0.8)`; or int
        windows [samples length]. None: stories for an embedded model and where no activations are
        read, else `wikitext2`.
      sparsity: Fraction to remove, 0 <= s < 1; a pattern sets its own.
      pattern: (n, m) for n zeros in every m consecutive inputs.
      allocation: Spreads the sparsity over the model, such as `pruning.owl()`.
      refine: Improves the masks, such as `pruning.dsnot()`.
      samples: Windows to draw from a source.
      length: Tokens in a window.
      seed: Seed of the draw, and of what is random in a method.
      runtime: Micro-batch, devices, progress; no result depends on it.

    Returns:
      The pruned model, with its outcome.

    Raises:
      InputError: A setting is wrong, or the method cannot follow it on this model.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise InputError(
                "is no pruning method",
                f"choose of {', '.join(METHODS)}",
                field="method",
                value=method,
            )
        method = METHODS[method]()
    if pattern:
        sparsity = pattern[0] / pattern[1]
    if not 0 <= sparsity < 1:
        raise InputError("must be at least 0 and below 1", field="sparsity", value=sparsity)
    request = Request(sparsity, pattern, allocation, refine, seed)
    if calibration is None:
        calibration, _ = default_calibration(
            is_embedded(model.checkpoint.directory), types.reads_activations(method, request)
        )
    if isinstance(calibration, str | SelfText):
        calibration = _read_windows(model, calibration, samples, length, seed, runtime)
    windows = np.asarray(calibration)
    pruned, outcome = types.prune(model.model, method, windows, request, runtime)
    return LanguageModel(pruned, model.checkpoint, outcome)


def perplexity(
    model: LanguageModel,
    data: str | np.ndarray = "embedded",
    *,
    length: int = 256,
    windows: int = 0,
    batch: int = 8,
) -> float:
    """Return the perplexity, exp of the mean over windows of the mean cross-entropy in nats.

    Args:
      model: Dense or pruned.
      data: Source of the text, as `--eval_data` names it, or int windows [windows length].
      length: Tokens in a window.
      windows: Most windows; 0 for all.
      batch: Windows in one micro-batch.
    """
    if isinstance(data, str):
        tokenizer, vocab = model._tokenizer(), model.model.arch.config.vocab
        options = {"length": length, "windows": windows, "vocab": vocab}
        data = evaluation_tokens(data, tokenizer, **options).ids
    return window_perplexity(model.model, np.asarray(data), batch=batch).value


def save(model: LanguageModel, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Write a checkpoint that `transformers` loads; the directory is complete, or not there.

    Args:
      model: Dense or pruned.
      directory: New directory.

    Returns:
      The directory.

    Raises:
      InputError: The directory exists and holds files.
    """
    target = pathlib.Path(directory)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} holds files already", "choose a new directory")
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    writer = Writer(unfinished, model.checkpoint.config)
    for i, block in enumerate(model.model.blocks):
        writer.put(i, block)
    kept_blocks = model.outcome.kept_blocks if model.outcome else None
    writer.finish(model.model.non_block, model.checkpoint.directory, kept_blocks)
    if target.exists():
        target.rmdir()
    unfinished.rename(target)
    return target
