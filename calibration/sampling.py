"""Cut windows of tokens from text, in the three ways of the published protocols.

Windows are int64 [samples length]. The draws are those of `get_loaders` in the official code of
SparseGPT (Frantar and Alistarh 2023, `datautils.py`) and Wanda (Sun et al. 2024, `lib/data.py`),
call for call: `random.Random(seed)` draws what the module `random` draws after `random.seed(seed)`.
Ids are not in int32 yet: the caller first checks that they are in the vocabulary.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from models.errors import InputError

Encode = Callable[[str], Sequence[int]]  # text -> its token ids


class ShortDocuments(InputError):
    """No document has more tokens than a window."""


def random_windows(
    ids: Sequence[int], samples: int, length: int, seed: int, source: str
) -> np.ndarray:
    """Cut windows at random places of one stream of tokens, as for WikiText-2 and PTB.

    Args:
      ids: The stream.
      samples: Number of windows; they may overlap.
      length: Tokens in a window.
      seed: Decides the places.
      source: Name of the stream, for error messages.

    Returns:
      Windows int64 [samples length].

    Raises:
      InputError: The stream has at most `length` tokens.
    """
    last_start = len(ids) - length - 1  # the official code never draws the very last window
    if last_start < 0:
        raise InputError(
            f"has {len(ids)} tokens, and drawing a window of {length} needs {length + 1}",
            "give more text or lower `calibration_length`",
            field="calibration",
            value=source,
        )
    draw = random.Random(seed)
    stream = np.asarray(ids, np.int64)
    starts = [draw.randint(0, last_start) for _ in range(samples)]
    return np.stack([stream[start : start + length] for start in starts])


def document_windows(
    documents: Sequence[str], encode: Encode, samples: int, length: int, seed: int, source: str
) -> tuple[np.ndarray, int]:
    """Cut each window at a random place of a random document that is long enough, as for C4.

    Documents are drawn until one has more than `length` tokens, so only drawn documents are
    tokenized, and each of them once.

    Args:
      documents: Texts to draw from.
      encode: Text -> token ids.
      samples: Number of windows.
      length: Tokens in a window.
      seed: Decides documents and places.
      source: Name of the documents, for error messages.

    Returns:
      Windows int64 [samples length], and the number of documents that they come from.

    Raises:
      ShortDocuments: No document has more than `length` tokens.
    """
    draw = random.Random(seed)
    lengths_of_short: dict[int, int] = {}  # document -> its tokens
    long: dict[int, np.ndarray] = {}  # document -> its token ids
    windows = []
    # Document and place are drawn in turn, as in the official loop: the order decides the windows.
    for _ in range(samples):
        ids = _draw_document(documents, encode, length, draw, lengths_of_short, long, source)
        start = draw.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
    return np.stack(windows), len(long)


def _draw_document(
    documents: Sequence[str],
    encode: Encode,
    length: int,
    draw: random.Random,
    lengths_of_short: dict[int, int],
    long: dict[int, np.ndarray],
    source: str,
) -> np.ndarray:
    """Draw documents until one has more than `length` tokens, and return its tokens."""
    while len(lengths_of_short) < len(documents):
        i = draw.randint(0, len(documents) - 1)
        if i in long:
            return long[i]
        if i in lengths_of_short:
            continue
        ids = encode(documents[i])
        # SparseGPT also takes a document of exactly `length` tokens, and then fails on it. Wanda
        # asks for more.
        if len(ids) > length:
            long[i] = np.asarray(ids, np.int64)
            return long[i]
        lengths_of_short[i] = len(ids)
    longest = max(lengths_of_short.values(), default=0)
    raise ShortDocuments(
        f"has {len(documents)} documents, none of more than {length} tokens "
        f"(the longest has {longest})",
        "give longer documents or lower `calibration_length`",
        field="calibration",
        value=source,
    )


def consecutive_windows(
    ids: Sequence[int], length: int, max_windows: int, source: str
) -> np.ndarray:
    """Cut a stream of tokens into windows, one behind the other, and drop the incomplete tail.

    Args:
      ids: The stream.
      length: Tokens in a window.
      max_windows: Most windows to cut; 0 cuts all.
      source: Name of the stream, for error messages.

    Returns:
      Windows int64 [samples length].

    Raises:
      InputError: The stream has fewer than `length` tokens.
    """
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"has {len(ids)} tokens, less than a window of {length}",
            "give more text or lower `eval_length`",
            field="eval_data",
            value=source,
        )
    count = min(count, max_windows) if max_windows else count
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)
