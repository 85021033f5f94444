"""Calibration windows that the dense model writes itself.

A window is the token that begins a text, the first tokens of a prompt where prompts are given, and
the model's own tokens. A text goes on behind its end, as in the packed texts that models are
trained on. Williams et al. 2024 (arXiv 2410.17170) calibrate on such text.

Windows are written in batches of one size, each with a key of its own, so that a window depends
neither on how many there are nor on the micro-batch of the run. Finished batches are kept on disk.
"""

import functools
import hashlib
import pathlib
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from calibration.corpora import load_corpus
from calibration.data import Tokens, check_windows
from calibration.digests import file_digest, token_digest
from calibration.special_tokens import start_token
from calibration.states import available_memory
from calibration.tokenizer import Tokenizer
from calibration.window_cache import read_windows, window_file, write_windows
from models.arch import Model
from models.checkpoint.reader import Checkpoint, weight_files
from models.errors import InputError
from models.generate import generate
from models.processes import is_multiprocess
from models.progress import Progress, no_progress
from models.sharding import place, split

BATCH = 8  # windows that are written at once; others depend on it, see FORM
FORM = 1  # of the windows; to be raised when equal settings give other windows
TEMPERATURES = 1e-3, 100.0  # bounds; outside them logits leave float32 or say nothing


class SelfText(NamedTuple):
    """Settings of text that the model writes itself.

    Attributes:
      temperature: Divisor of the logits; 0 takes the most likely token.
      top_p: Probability of the nucleus that tokens are drawn from.
      prompts: Source of documents whose first tokens begin the windows; empty for none.
      prompt_tokens: Tokens of a prompt.
    """

    temperature: float
    top_p: float
    prompts: str
    prompt_tokens: int


def self_text(
    temperature: float = 1.0, top_p: float = 1.0, prompts: str = "", prompt_tokens: int = 8
) -> SelfText:
    """Return settings of text that the model writes itself.

    Args:
      temperature: Divisor of the logits, 0.001 to 100; 0 takes the most likely token.
      top_p: Probability of the nucleus that tokens are drawn from, 0 < top_p <= 1.
      prompts: File or hub data set of documents whose first tokens begin the windows; empty to
        begin with the token alone that begins a text.
      prompt_tokens: Tokens of a prompt.

    Raises:
      InputError: A setting is out of range.
    """
    low, high = TEMPERATURES
    if temperature != 0 and not low <= temperature <= high:
        raise _error(f"has temperature={temperature}", f"give 0, or {low:g} to {high:g}")
    if not 0 < top_p <= 1:
        raise _error(f"has top_p={top_p}", "give a number above 0 and at most 1")
    if prompt_tokens < 1:
        raise _error(f"has prompt_tokens={prompt_tokens}", "give 1 or more")
    return SelfText(temperature, top_p, prompts, prompt_tokens)


def generated_windows(
    settings: SelfText,
    checkpoint: Checkpoint,
    tokenizer: Callable[[], Tokenizer],
    *,
    samples: int,
    length: int,
    seed: int,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
) -> Tokens:
    """Let a model write windows, or read them from the disk where it has written them before.

    Args:
      settings: How it writes them.
      checkpoint: The model, read into memory while it writes.
      tokenizer: Returns its tokenizer; called for prompts, and where no configuration names BOS.
      samples: Number of windows.
      length: Tokens in a window.
      seed: Decides prompts and draws.
      mesh: Devices; None: one.
      progress: Shows the progress.

    Returns:
      The windows.

    Raises:
      InputError: The settings do not go together, the model cannot write such windows, or the
        prompts cannot be read.
    """
    check_windows(samples, length)
    _check_model(checkpoint, length, mesh)
    batches = -(-samples // BATCH)
    start = start_token(checkpoint, tokenizer)
    seeds, origin, remarks = _seeds(settings, tokenizer, start, samples, batches * BATCH, seed)
    _check_seeds(seeds[:samples], settings, length, checkpoint.model.arch.config.vocab)
    weights = weights_digest(checkpoint)
    facts = _facts(settings, checkpoint, weights, mesh, length, seed)
    ids = np.concatenate(list(_batches(settings, checkpoint, seeds, facts, mesh, progress)))
    ids = np.ascontiguousarray(ids[:samples], np.dtype("<i4"))
    protocol = {
        "source": "self",
        "dataset": "self",
        "seed": seed,
        "cut": "windows that the dense model wrote",
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "start": start,
        **origin,
        "weights": weights,
        "dtype": facts["dtype"],
        "sha256": token_digest(ids),
        "samples": samples,
        "length": length,
    }
    return Tokens(ids, protocol, tuple(remarks))


def _check_model(checkpoint: Checkpoint, length: int, mesh: Mesh | None) -> None:
    """Check that a model can write windows of a length here."""
    if is_multiprocess():
        raise _error("works in one process only", "give text or a .npy file of tokens")
    positions = getattr(checkpoint.model.arch.config, "positions", length)
    if length > positions:
        raise _error(
            f"has windows of {length} tokens, the model has {positions} positions",
            "give a shorter length",
        )
    itemsize = checkpoint.model.non_block.embed.dtype.itemsize
    needed = memory_needed(checkpoint.specs, checkpoint.parameters, itemsize, length, mesh)
    available = available_memory()
    # A CPU's devices share the host's memory.
    size = mesh.size if mesh and not available["device"] else 1
    if needed * size > (available["device"] or available["host"]):
        raise _error(
            f"needs the whole model and its cache in memory, {needed * size >> 20} MiB",
            "give text or a .npy file of tokens",
        )


def _check_seeds(seeds: np.ndarray, settings: SelfText, length: int, vocab: int) -> None:
    """Check that a model can write different windows behind first tokens [samples t]."""
    samples, given = seeds.shape
    if settings.temperature == 0 and len(np.unique(seeds, axis=0)) < samples:
        raise _error(
            f"with temperature=0 writes fewer than {samples} different windows",
            "give a higher temperature, or more prompts",
        )
    if given >= length:
        raise InputError(
            f"leaves nothing to write behind {given} given tokens",
            "give a larger number",
            field="calibration_length",
            value=length,
        )
    if seeds.max() >= vocab:
        raise _error(
            f"has a prompt with token {seeds.max()}, the model's vocabulary ends at {vocab - 1}",
            "use this model's own tokenizer",
        )


def memory_needed(
    blocks: Sequence[Any], parameters: int, itemsize: int, length: int, mesh: Mesh | None
) -> int:
    """Return the bytes of one device that a model and its cache take while it writes.

    Args:
      blocks: Specs or shapes of each block.
      parameters: Number of the model's parameters.
      itemsize: Bytes of a parameter in memory.
      length: Tokens in a window.
      mesh: Devices; None: one.
    """
    sizes = dict(mesh.shape) if mesh else {"data": 1, "model": 1}
    keys = sum(block.k.w.shape[0] for block in blocks)
    # Rows that devices do not divide lie on all of them.
    rows = BATCH if BATCH % sizes["data"] else BATCH // sizes["data"]
    cache = 2 * keys * length * rows
    return (parameters // sizes["model"] + cache) * itemsize


def _seeds(
    settings: SelfText,
    tokenizer: Callable[[], Tokenizer],
    start: int,
    samples: int,
    rows: int,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Return the first tokens of windows, int32 [rows t], their record, and clauses of warning."""
    if not settings.prompts:
        return np.full((rows, 1), start, np.int32), {"prompts": None}, []
    corpus = load_corpus(settings.prompts, "calibration")
    documents = corpus.texts
    if not corpus.by_document:
        # One stream: its lines are the documents.
        documents = [line for text in documents for line in text.splitlines()]
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    prompts: list[list[int]] = []
    for i in order:
        if len(prompts) == rows:
            break
        prompt = tokenizer()(documents[i])[: settings.prompt_tokens]
        if len(prompt) == settings.prompt_tokens:
            prompts.append(prompt)
    if not prompts:
        raise _error(
            f"finds no document of {settings.prompt_tokens} tokens in {settings.prompts}",
            "give longer documents or lower prompt_tokens",
        )
    remarks = []
    if len(prompts) < samples:
        remarks.append(
            f"the {samples} windows that the model writes begin with {len(prompts)} prompts, as "
            f"{settings.prompts} has no more documents of {settings.prompt_tokens} tokens"
        )
    ids = np.asarray([[start, *prompts[i % len(prompts)]] for i in range(rows)], np.int32)
    origin = {"source": settings.prompts, "tokens": settings.prompt_tokens, **corpus.stamp}
    return ids, {"prompts": origin | {"sha256": token_digest(ids[:samples])}}, remarks


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of the digests and names of a model's weight files.

    Args:
      checkpoint: The model.
    """
    stats = [(path, path.stat()) for path in weight_files(checkpoint.directory)]
    # With time and size: a process may read the windows of several draws.
    return _files_digest(tuple((path, s.st_size, s.st_mtime_ns) for path, s in stats))


@functools.cache
def _files_digest(files: tuple[tuple[pathlib.Path, int, int], ...]) -> str:
    """Return the SHA-256 of the digests and names of files."""
    lines = [f"{file_digest(path)} {path.name}\n" for path, _, _ in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _facts(
    settings: SelfText,
    checkpoint: Checkpoint,
    weights: str,
    mesh: Mesh | None,
    length: int,
    seed: int,
) -> dict[str, Any]:
    """Return everything but the first tokens that a batch of windows depends on, JSON-able."""
    return {
        "form": FORM,
        "configuration": checkpoint.config,
        "weights": weights,
        "dtype": str(checkpoint.model.non_block.embed.dtype),
        "sampling": [settings.temperature, settings.top_p, seed],
        "length": length,
        # Rounding decides between tokens that are nearly as likely.
        "device": [platform.machine(), jax.devices()[0].device_kind],
        "mesh": dict(mesh.shape) if mesh else {},
        "jax": jax.__version__,
    }


def _batches(
    settings: SelfText,
    checkpoint: Checkpoint,
    seeds: np.ndarray,
    facts: dict[str, Any],
    mesh: Mesh | None,
    progress: Progress,
) -> Iterator[np.ndarray]:
    """Yield batches of windows, int32 [BATCH length], written or read."""
    length, key = facts["length"], jax.random.key(facts["sampling"][-1])
    batches = np.split(seeds, len(seeds) // BATCH)
    files = [window_file([facts, j, rows.tolist()]) for j, rows in enumerate(batches)]
    stored = [read_windows(file, (BATCH, length)) for file in files]
    done, tokens = sum(ids is not None for ids in stored), len(seeds) * length
    advance = progress("writing windows", len(files), unit="batches", tokens=tokens, done=done)
    model = None
    for j, (rows, ids) in enumerate(zip(batches, stored, strict=True)):
        if ids is None:
            model = model or _on_devices(checkpoint, mesh)
            new = generate(
                model,
                split(rows, mesh, "sample"),
                length - rows.shape[1],
                temperature=settings.temperature,
                top_p=settings.top_p,
                key=jax.random.fold_in(key, j),
            )
            ids = np.concatenate([rows, new], axis=1)
            write_windows(files[j], ids)
            advance()
        yield ids


def _on_devices(checkpoint: Checkpoint, mesh: Mesh | None) -> Model:
    """Read a whole model onto the devices."""
    arch, non_block, blocks = checkpoint.model
    return Model(arch, place(non_block, mesh), tuple(place(block, mesh) for block in blocks))


def _error(reason: str, remedy: str) -> InputError:
    """Return the error for `self` as the source."""
    return InputError(reason, remedy, field="calibration", value="self")
