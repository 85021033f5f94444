"""Load the tokens to calibrate on and to evaluate on.

Sources are hub data sets, local files, and generated stories that ship with the project. Windows
follow the published protocols (see `sampling` and `corpora`), and every result records how to get
it again.
"""

import itertools
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.corpora import SETTINGS, Corpus, Purpose, load_corpus
from calibration.digests import token_digest
from calibration.sampling import (
    ShortDocuments,
    consecutive_windows,
    document_windows,
    random_windows,
)
from calibration.stories import generator as stories
from calibration.tokenizer import Tokenizer
from models.errors import InputError
from models.untrusted import MOST, UserFile, is_count, shown, user_path

EMBEDDED_EVAL_WINDOWS = 64  # the stories never end, so "all windows" of `embedded` means these
# Bounds of what is asked for; published protocols have 1,024 windows and 2**18 tokens at most.
MOST_WINDOWS = 1 << 20
MOST_LENGTH = 1 << 20
MOST_TOKENS = 1 << 27
# Windows to a document from which on the report doubts that they stand for the text at large.
FEW_DOCUMENTS = 8


class Tokens(NamedTuple):
    """Windows of tokens, and their origin.

    Attributes:
      ids: Token ids, int32 [samples length].
      protocol: JSON-able record of the origin. Its "sha256" is that of the bytes of `ids`.
      warnings: Clauses about texts that are too few or too short.
    """

    ids: np.ndarray
    protocol: dict[str, Any]
    warnings: tuple[str, ...] = ()


def default_calibration(embedded_model: bool, reads_activations: bool) -> tuple[str, str]:
    """Return the source to calibrate on where none is named, and the reason.

    Args:
      embedded_model: Whether the model ships with the project.
      reads_activations: Whether the result depends on the windows at all.
    """
    # Stories for small children suit the models that were trained on them, and no others.
    if embedded_model:
        return "embedded", "the default for an embedded model"
    if not reads_activations:
        return "embedded", "the method reads no activations: any text does"
    return "wikitext2", "the default for a model that is not embedded"


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
    check_windows(samples, length)
    if is_token_file(source):
        ids = _read_npy(source, "calibration")
        return _checked(ids, vocab, "calibration", {"source": source, "seed": seed})
    # Stories are random by themselves: windows in order need no further draw.
    if source == "embedded":
        return _story_windows("calibration", seed, tokenizer(), (samples, length), vocab)
    # The corpus first: a wrong source is refused before the tokenizer is read.
    corpus = load_corpus(source, "calibration")
    ids, cut, remarks = _draw(corpus, tokenizer(), samples, length, seed, source)
    protocol = {"source": source, "seed": seed, **corpus.stamp, **cut}
    return _checked(ids, vocab, "calibration", protocol, tuple(remarks))


def _draw(
    corpus: Corpus, tokenizer: Tokenizer, samples: int, length: int, seed: int, source: str
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """Draw windows of a corpus; return ids, the record of the cut, and clauses of warning."""
    special = corpus.special_tokens
    remarks: list[str] = []

    def encode(text: str) -> Sequence[int]:
        return tokenizer(text, special)

    if corpus.by_document:
        try:
            ids, drawn = document_windows(corpus.texts, encode, samples, length, seed, source)
        except ShortDocuments as e:
            if not corpus.joins_short:
                raise
            remarks.append(f"{source} {e.reason}: windows go across documents")
        else:
            if samples >= FEW_DOCUMENTS * drawn:
                remarks.append(
                    f"all {samples} windows of {source} come from {drawn} of its "
                    f"{len(corpus.texts)} documents, as a window needs more than {length} tokens"
                )
            # No joiner: a window lies within one document, as in the papers' loaders of C4.
            return ids, _cut_record("random windows of random documents", None, special), remarks
    stream = encode(corpus.join.join(corpus.texts))
    ids = random_windows(stream, samples, length, seed, source)
    return ids, _cut_record("random windows", corpus.join, special), remarks


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
    _check_range(2, MOST_LENGTH, eval_length=length)
    _check_range(0, MOST, eval_windows=windows)
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
        _check_total(*shape, "eval_windows")
        return _story_windows("evaluation", 0, tokenizer(), shape, vocab)
    corpus = load_corpus(source, "evaluation")
    stream = tokenizer()(corpus.join.join(corpus.texts), corpus.special_tokens)
    # The protocol's own limit holds unless fewer windows are asked for.
    most = min((limit for limit in (windows, corpus.max_windows) if limit), default=0)
    ids = consecutive_windows(stream, length, most, source)
    cut = _cut_record("consecutive windows", corpus.join, corpus.special_tokens)
    protocol = {"source": source, **corpus.stamp, **cut}
    return _checked(ids, vocab, "evaluation", protocol)


def is_token_file(source: str) -> bool:
    """Return True if a source is a file of tokens, which is used whole, whatever the seed."""
    return pathlib.Path(source).suffix == ".npy"


def _story_windows(
    purpose: Purpose, seed: int, encode: Tokenizer, shape: tuple[int, int], vocab: int
) -> Tokens:
    """Cut consecutive windows [samples length] from the generated stories."""
    count = shape[0] * shape[1]
    # Each story is tokenized by itself: a window must not depend on how many follow it.
    ids = itertools.chain.from_iterable(
        _encode_story(encode, story) for story in stories.stream(purpose, seed)
    )
    windows = np.fromiter(itertools.islice(ids, count), np.int64, count).reshape(shape)
    cut = _cut_record("consecutive windows", "", False)
    protocol = {"source": "embedded", "seed": seed, "split": purpose, **cut}
    return _checked(windows, vocab, purpose, protocol)


def _encode_story(encode: Tokenizer, story: str) -> Sequence[int]:
    """Return the tokens of a story; InputError if there are none, as then no window gets full."""
    ids = encode(story)
    if not ids:
        raise InputError(
            "the model's tokenizer gives no tokens for a text",
            "copy it again from the original model",
        )
    return ids


def token_shape(source: str, purpose: Purpose) -> tuple[int, int]:
    """Return samples and length of a `.npy` file of tokens, without reading them.

    Args:
      source: The file.
      purpose: What the tokens are for; it names the setting in errors.

    Raises:
      InputError: The file cannot be read, or holds no integers [samples length].
    """
    file = UserFile(user_path(source, SETTINGS[purpose]), SETTINGS[purpose])
    file.check()
    try:
        with file.path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about headers of Python 2, which are read all the same
            version = np.lib.format.read_magic(stream)
            reads = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, _, dtype = reads[version](stream)
            present = os.fstat(stream.fileno()).st_size - stream.tell()
    except Exception as e:  # numpy lets through ValueError, tokenize.TokenError and others
        raise file.error(
            "is not a readable .npy file", "write it with numpy.save, integers [samples, length]"
        ) from e
    if dtype.kind not in "iu":
        raise file.error(
            f"holds {dtype}, and tokens are integers",
            "save an integer array [samples, length]",
        )
    if len(shape) != 2 or not all(is_count(size) for size in shape):
        raise file.error(
            f"has shape {shown(list(shape))}, and tokens are [samples, length]",
            "save a matrix with at least one window and one token",
        )
    # Before anything of that size is allocated.
    if shape[0] * shape[1] * dtype.itemsize > present:
        raise file.error("is not a readable .npy file: it is cut short", "write it again")
    return shape[0], shape[1]


def _read_npy(source: str, purpose: Purpose) -> np.ndarray:
    """Read integer tokens [samples length] from a `.npy` file, never from a pickle."""
    token_shape(source, purpose)
    path = user_path(source, SETTINGS[purpose])
    # Not np.load, which also reads archives.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.lib.format.read_array(file, allow_pickle=False)


def _cut_record(cut: str, join: str | None, special_tokens: bool) -> dict[str, Any]:
    """Record how windows were cut from texts; `join` is None if each text stays by itself."""
    return {"cut": cut, "join": join, "special_tokens": special_tokens}


def _checked(
    ids: np.ndarray,
    vocab: int,
    purpose: Purpose,
    protocol: dict[str, Any],
    warnings: tuple[str, ...] = (),
) -> Tokens:
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
    record = {**protocol, "sha256": token_digest(ids), "samples": samples, "length": length}
    return Tokens(ids, record, warnings)


def _source_error(source: str, purpose: Purpose, reason: str, remedy: str) -> InputError:
    """Return the error for a source that cannot be used."""
    return InputError(reason, remedy, field=SETTINGS[purpose], value=source)


def check_windows(samples: int, length: int) -> None:
    """Check that calibration windows which are asked for are no more than a run can use.

    Args:
      samples: Number of windows.
      length: Tokens in a window.

    Raises:
      InputError: There are too few or too many.
    """
    _check_range(1, MOST_WINDOWS, calibration_samples=samples)
    _check_range(1, MOST_LENGTH, calibration_length=length)
    _check_total(samples, length, "calibration_samples")


def _check_range(least: int, most: int, **settings: int) -> None:
    """Check that settings are within bounds."""
    for name, value in settings.items():
        if value < least:
            raise InputError("is too small", f"give {least} or more", field=name, value=value)
        if value > most:
            raise InputError("is too large", f"give {most} or less", field=name, value=value)


def _check_total(samples: int, length: int, field: str) -> None:
    """Check that windows that are yet to be made have no more tokens than a run can use."""
    if samples * length > MOST_TOKENS:
        raise InputError(
            f"asks for {samples * length} tokens of windows of {length}",
            f"give {MOST_TOKENS // length} or less",
            field=field,
            value=samples,
        )
