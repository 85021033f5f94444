"""How windows are cut from text: the three ways of the published protocols. Windows are int32 [samples, length].

The draws are those of `get_loaders` in the released code of SparseGPT (Frantar and Alistarh 2023, `datautils.py`) and Wanda
(Sun et al. 2024, `lib/data.py`), call for call: `random.Random(seed)` draws what the module draws after `random.seed(seed)`.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from models.errors import InputError

Encode = Callable[[str], Sequence[int]]


def random_windows(
    ids: Sequence[int], samples: int, length: int, seed: int, source: str
) -> np.ndarray:
    """`samples` windows at random places of one stream of tokens (WikiText-2, PTB). They may overlap.

    Raises InputError, which names `source`, when the stream has no more than `length` tokens.
    """
    last = len(ids) - length - 1  # the published code never draws the very last window
    if last < 0:
        need = f"drawing a window of {length} needs {length + 1}"
        raise InputError(
            f"{source} has {len(ids)} tokens, and {need}: give more text or lower --calibration_length"
        )
    draw, stream = random.Random(seed), np.asarray(ids, np.int32)
    starts = [draw.randint(0, last) for _ in range(samples)]
    return np.stack([stream[i : i + length] for i in starts])


def document_windows(
    documents: Sequence[str], encode: Encode, samples: int, length: int, seed: int, source: str
) -> np.ndarray:
    """`samples` windows, each at a random place of a random document of more than `length` tokens (C4).

    Documents are drawn until one is long enough, so only what is drawn is tokenized. SparseGPT also takes a document of exactly
    `length` tokens, and then fails on it; Wanda's `>` holds here.

    Raises InputError, which names `source`, when no document is long enough.
    """
    draw, short = (
        random.Random(seed),
        dict[int, int](),
    )  # short: the tokens of each document that was too short
    windows = []
    for _ in range(samples):
        ids = _draw_document(documents, encode, length, draw, short, source)
        start = draw.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
    return np.array(windows, np.int32)


def _draw_document(
    documents: Sequence[str],
    encode: Encode,
    length: int,
    draw: random.Random,
    short: dict[int, int],
    source: str,
) -> Sequence[int]:
    while len(short) < len(documents):
        i = draw.randint(0, len(documents) - 1)
        if i in short:
            continue
        ids = encode(documents[i])
        if len(ids) > length:
            return ids
        short[i] = len(ids)
    longest = max(short.values(), default=0)
    raise InputError(
        f"none of the {len(documents)} documents of {source} has more than {length} tokens (the longest has {longest}): "
        "give longer documents or lower --calibration_length"
    )


def consecutive_windows(ids: Sequence[int], length: int, most: int, source: str) -> np.ndarray:
    """The stream cut into windows one after the other, the incomplete tail dropped; no more than `most` of them (0 = all).

    Raises InputError, which names `source`, when there is not one whole window.
    """
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"{source} has {len(ids)} tokens, less than a window of {length}: give more text or lower --eval_length"
        )
    count = min(count, most) if most else count
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)
