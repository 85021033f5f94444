"""Tokens to calibrate on and to evaluate on, from a hub data set, a local file, or stories that ship with the project.

Windows follow the published protocols (see `sampling` and `corpora`), and every result says how to get it again.
"""

import hashlib
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from calibration.corpora import load_corpus
from calibration.sampling import consecutive_windows, document_windows, random_windows
from calibration.stories import generator as stories
from calibration.tokenizer import Tokenizer
from models.errors import InputError

EMBEDDED_EVAL_WINDOWS = 64  # the stories never end, so "all windows" of `embedded` means these


class Tokens(NamedTuple):
    """Token windows and where they come from."""

    ids: np.ndarray  # int32 [samples, length]
    protocol: dict[str, Any]  # JSON-able; "sha256" is of the bytes of `ids`


def calibration_tokens(
    source: str,
    tokenizer: Callable[[], Tokenizer],
    *,
    samples: int,
    length: int,
    seed: int,
    vocab: int,
) -> Tokens:
    """`samples` windows of `length` tokens, drawn by `seed`.

    Sources: `wikitext2`, `c4`, `ptb` (hub), `embedded` (generated stories, in order), a `.txt`, `.raw`, `.jsonl` or `.parquet`
    file, or a `.npy` file of tokens [samples, length], which is taken whole and as it is: only that calls no `tokenizer`.

    Raises InputError: no such source, text that cannot be read or is too short, ids outside [0, `vocab`).
    """
    _at_least(1, calibration_samples=samples, calibration_length=length)
    if taken_whole(source):
        return _tokens(_read_npy(source), vocab, {"source": source, "seed": seed})
    if source == "embedded":
        ids = _story_tokens("calibration", seed, tokenizer(), samples * length).reshape(
            samples, length
        )
        return _tokens(
            ids,
            vocab,
            {
                "source": source,
                "seed": seed,
                "split": "calibration",
                **_how("consecutive windows", "", False),
            },
        )
    corpus, encode = load_corpus(source, "calibration"), tokenizer()
    special = corpus.special_tokens
    if corpus.by_document:
        ids = document_windows(
            corpus.texts, lambda text: encode(text, special), samples, length, seed, source
        )
        how = _how("random windows of random documents", None, special)
    else:
        ids = random_windows(
            encode(corpus.join.join(corpus.texts), special), samples, length, seed, source
        )
        how = _how("random windows", corpus.join, special)
    return _tokens(ids, vocab, {"source": source, "seed": seed, **corpus.stamp, **how})


def evaluation_tokens(
    source: str, tokenizer: Callable[[], Tokenizer], *, length: int, windows: int, vocab: int
) -> Tokens:
    """Consecutive windows of `length` tokens, the tail dropped, no BOS added to a window; at most `windows` of them (0 = all).

    Sources as for `calibration_tokens`. Of `embedded`, all means 64 windows; of `c4`, the protocol's 256. A row of a `.npy` file
    is a window, whatever `length` says.

    Raises InputError: no such source, text that cannot be read or is too short, ids outside [0, `vocab`).
    """
    _at_least(2, eval_length=length)
    _at_least(0, eval_windows=windows)
    if taken_whole(source):
        ids = _read_npy(source)
        if ids.shape[1] < 2:
            raise InputError(
                f"{source} has windows of one token, which leaves nothing to predict: give windows of two or more"
            )
        return _tokens(ids[: windows or None], vocab, {"source": source})
    if source == "embedded":
        windows = windows or EMBEDDED_EVAL_WINDOWS
        ids = _story_tokens("evaluation", 0, tokenizer(), windows * length).reshape(windows, length)
        return _tokens(
            ids,
            vocab,
            {
                "source": source,
                "seed": 0,
                "split": "evaluation",
                **_how("consecutive windows", "", False),
            },
        )
    corpus, encode = load_corpus(source, "evaluation"), tokenizer()
    most = min((limit for limit in (windows, corpus.most_windows) if limit), default=0)
    ids = consecutive_windows(
        encode(corpus.join.join(corpus.texts), corpus.special_tokens), length, most, source
    )
    return _tokens(
        ids,
        vocab,
        {
            "source": source,
            **corpus.stamp,
            **_how("consecutive windows", corpus.join, corpus.special_tokens),
        },
    )


def _story_tokens(split: stories.Split, seed: int, encode: Tokenizer, count: int) -> np.ndarray:
    """The first `count` tokens of the stories, each tokenized by itself: a window does not depend on how many follow it."""
    ids = itertools.chain.from_iterable(encode(story) for story in stories.stream(split, seed))
    return np.fromiter(itertools.islice(ids, count), np.int32, count)


def taken_whole(source: str) -> bool:
    """Whether a source is taken whole and as it is, so that no seed changes it."""
    return pathlib.Path(source).suffix == ".npy"


def _read_npy(source: str) -> np.ndarray:
    """Integer tokens [samples, length] of a `.npy` file; never a pickle."""
    try:
        with (
            pathlib.Path(source).expanduser().open("rb") as file
        ):  # not np.load, which also takes archives
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as e:
        raise InputError(f"{source}: there is no such file, check the path") from e
    except Exception as e:  # numpy lets through ValueError, tokenize.TokenError, and MemoryError for a header that lies
        raise InputError(
            f"{source} is not a readable .npy file: write it with numpy.save, integers [samples, length]"
        ) from e
    if ids.dtype.kind not in "iu":
        raise InputError(
            f"{source} holds {ids.dtype}, and tokens are integers: save an integer array [samples, length]"
        )
    if ids.ndim != 2 or ids.size == 0:
        raise InputError(
            f"{source} has shape {list(ids.shape)}, and tokens are [samples, length], neither of them 0"
        )
    return ids


def _how(cut: str, join: str | None, special_tokens: bool) -> dict[str, Any]:
    """How windows were made of texts. `join` is None where each text stays by itself."""
    return {"cut": cut, "join": join, "special_tokens": special_tokens}


def _tokens(ids: np.ndarray, vocab: int, stamp: dict[str, Any]) -> Tokens:
    """Check the range, in the integers' own width, then stamp."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        outside = f"token id {wrong} is outside the model's vocabulary (0 to {vocab - 1})"
        raise InputError(f"{stamp['source']}: {outside}: use this model's own tokenizer")
    ids = np.ascontiguousarray(ids, np.dtype("<i4"))
    samples, length = ids.shape
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return Tokens(ids, {**stamp, "sha256": digest, "samples": samples, "length": length})


def _at_least(least: int, **flags: int) -> None:
    for flag, value in flags.items():
        if value < least:
            raise InputError(f"--{flag}={value} is too small: give {least} or more")
