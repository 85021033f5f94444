"""Load the tokens to calibrate on and to evaluate on.

Sources are hub data sets, local files, and generated stories that ship with the project. Windows
follow the published protocols (see `sampling` and `corpora`), and every result records how to get
it again.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from calibration.corpora import SETTINGS, Purpose, load_corpus
from calibration.sampling import consecutive_windows, document_windows, random_windows
from calibration.stories import generator as stories
from calibration.tokenizer import Tokenizer
from models.errors import InputError

EMBEDDED_EVAL_WINDOWS = 64  # the stories never end, so "all windows" of `embedded` means these


class Tokens(NamedTuple):
    """Windows of tokens, and their origin.

    Attributes:
      ids: Token ids, int32 [samples length].
      protocol: JSON-able record of the origin. Its "sha256" is that of the bytes of `ids`.
    """

    ids: np.ndarray
    protocol: dict[str, Any]


def calibration_tokens(
    source: str,
    tokenizer: Callable[[], Tokenizer],
    *,
    samples: int,
    length: int,
    seed: int,
    vocab: int,
) -> Tokens:
    """Load windows to calibrate on.

    Args:
      source: `wikitext2`, `c4` or `ptb` of the hub; `embedded` for generated stories, in order; a
        `.txt`, `.raw`, `.jsonl` or `.parquet` file; or a `.npy` file of tokens [samples length],
        which is used whole and unchanged.
      tokenizer: Returns the model's tokenizer; not called for a `.npy` file.
      samples: Number of windows.
      length: Tokens in a window.
      seed: Decides the windows.
      vocab: Tokens of the model's vocabulary.

    Returns:
      The windows.

    Raises:
      InputError: The source does not exist, cannot be read or is too short, or an id is outside
        the vocabulary.
    """
    _check_least(1, calibration_samples=samples, calibration_length=length)
    if is_token_file(source):
        ids = _read_npy(source, "calibration")
        return _checked(ids, vocab, "calibration", {"source": source, "seed": seed})
    # Stories are random by themselves: windows in order need no further draw.
    if source == "embedded":
        return _story_windows("calibration", seed, tokenizer(), (samples, length), vocab)
    # The corpus first: a wrong source is refused before the tokenizer is read.
    corpus = load_corpus(source, "calibration")
    encode = tokenizer()
    special = corpus.special_tokens
    if corpus.by_document:
        ids = document_windows(
            corpus.texts, lambda text: encode(text, special), samples, length, seed, source
        )
        # No joiner: a window lies within one document, as in the papers' loaders of C4.
        cut = _cut_record("random windows of random documents", None, special)
    else:
        stream = encode(corpus.join.join(corpus.texts), special)
        ids = random_windows(stream, samples, length, seed, source)
        cut = _cut_record("random windows", corpus.join, special)
    protocol = {"source": source, "seed": seed, **corpus.stamp, **cut}
    return _checked(ids, vocab, "calibration", protocol)


def evaluation_tokens(
    source: str, tokenizer: Callable[[], Tokenizer], *, length: int, windows: int, vocab: int
) -> Tokens:
    """Load consecutive windows to evaluate on, without a BOS and without the incomplete tail.

    Args:
      source: As for `calibration_tokens`. A row of a `.npy` file is a window, whatever `length`
        says.
      tokenizer: As for `calibration_tokens`.
      length: Tokens in a window.
      windows: Most windows to load; 0 loads all, which means 64 of `embedded` and the protocol's
        256 of `c4`.
      vocab: As for `calibration_tokens`.

    Returns:
      The windows.

    Raises:
      InputError: As for `calibration_tokens`.
    """
    _check_least(2, eval_length=length)
    _check_least(0, eval_windows=windows)
    if is_token_file(source):
        ids = _read_npy(source, "evaluation")
        if ids.shape[1] < 2:
            raise _source_error(
                source,
                "evaluation",
                "has windows of one token, which leaves nothing to predict",
                "give windows of two tokens or more",
            )
        return _checked(ids[: windows or None], vocab, "evaluation", {"source": source})
    if source == "embedded":
        # The seed is fixed, so that every model is evaluated on the same stories.
        shape = (windows or EMBEDDED_EVAL_WINDOWS, length)
        return _story_windows("evaluation", 0, tokenizer(), shape, vocab)
    corpus = load_corpus(source, "evaluation")
    stream = tokenizer()(corpus.join.join(corpus.texts), corpus.special_tokens)
    # The protocol's own limit holds unless fewer windows are asked for.
    most = min((limit for limit in (windows, corpus.max_windows) if limit), default=0)
    ids = consecutive_windows(stream, length, most, source)
    cut = _cut_record("consecutive windows", corpus.join, corpus.special_tokens)
    return _checked(ids, vocab, "evaluation", {"source": source, **corpus.stamp, **cut})


def is_token_file(source: str) -> bool:
    """Return True if a source is a file of tokens, which is used whole, whatever the seed."""
    return pathlib.Path(source).suffix == ".npy"


def _story_windows(
    purpose: Purpose, seed: int, encode: Tokenizer, shape: tuple[int, int], vocab: int
) -> Tokens:
    """Cut consecutive windows [samples length] from the generated stories."""
    count = shape[0] * shape[1]
    # Each story is tokenized by itself: a window must not depend on how many follow it.
    ids = itertools.chain.from_iterable(encode(story) for story in stories.stream(purpose, seed))
    windows = np.fromiter(itertools.islice(ids, count), np.int32, count).reshape(shape)
    cut = _cut_record("consecutive windows", "", False)
    protocol = {"source": "embedded", "seed": seed, "split": purpose, **cut}
    return _checked(windows, vocab, purpose, protocol)


def _read_npy(source: str, purpose: Purpose) -> np.ndarray:
    """Read integer tokens [samples length] from a `.npy` file, never from a pickle."""
    try:
        # Not np.load, which also reads archives.
        with pathlib.Path(source).expanduser().open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as e:
        raise _source_error(source, purpose, "does not exist", "check the path") from e
    # numpy lets through ValueError, tokenize.TokenError, and MemoryError for a wrong header.
    except Exception as e:
        raise _source_error(
            source,
            purpose,
            "is not a readable .npy file",
            "write it with numpy.save, integers [samples, length]",
        ) from e
    if ids.dtype.kind not in "iu":
        raise _source_error(
            source,
            purpose,
            f"holds {ids.dtype}, and tokens are integers",
            "save an integer array [samples, length]",
        )
    if ids.ndim != 2 or ids.size == 0:
        raise _source_error(
            source,
            purpose,
            f"has shape {list(ids.shape)}, and tokens are [samples, length]",
            "save a matrix with at least one window and one token",
        )
    return ids


def _cut_record(cut: str, join: str | None, special_tokens: bool) -> dict[str, Any]:
    """Record how windows were cut from texts; `join` is None if each text stays by itself."""
    return {"cut": cut, "join": join, "special_tokens": special_tokens}


def _checked(ids: np.ndarray, vocab: int, purpose: Purpose, protocol: dict[str, Any]) -> Tokens:
    """Check that ids [samples length] are in the vocabulary, and complete their record."""
    # In the integers' own width: a cast to int32 could wrap a wrong id into the vocabulary.
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise _source_error(
            protocol["source"],
            purpose,
            f"has token id {wrong} outside the model's vocabulary (0 to {vocab - 1})",
            "use this model's own tokenizer",
        )
    # Little-endian, so that the digest does not depend on the machine.
    ids = np.ascontiguousarray(ids, np.dtype("<i4"))
    samples, length = ids.shape
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return Tokens(ids, {**protocol, "sha256": digest, "samples": samples, "length": length})


def _source_error(source: str, purpose: Purpose, reason: str, remedy: str) -> InputError:
    """Return the error for a source that cannot be used."""
    return InputError(reason, remedy, field=SETTINGS[purpose], value=source)


def _check_least(least: int, **settings: int) -> None:
    """Check that settings are not below their least value."""
    for name, value in settings.items():
        if value < least:
            raise InputError("is too small", f"give {least} or more", field=name, value=value)
