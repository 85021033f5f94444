"""Data recipes of the official pruning code, with the same calls of the `random` module.

Source: SparseGPT `datautils.py` and Wanda `lib/data.py`. Here a token is a byte.
"""

import random
from collections.abc import Sequence

import numpy as np

BOS, VOCAB = 256, 257


def tokenize(text: str, special: bool = False) -> list[int]:
    """Return one token a byte, after a BOS if special tokens are wanted."""
    return [BOS] * special + list(text.encode())


def texts(count: int, longest: int, seed: int = 7) -> list[str]:
    """Return documents of 0 to `longest` bytes, no two windows of them alike."""
    draw = random.Random(seed)
    return [
        "".join(draw.choices("abcdefghij klmno\n", k=draw.randint(0, longest)))
        for _ in range(count)
    ]


def paper_stream(ids: Sequence[int], samples: int, seed: int, length: int) -> np.ndarray:
    """Draw windows as SparseGPT's and Wanda's loaders do from WikiText-2 and PTB."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        i = random.randint(0, len(ids) - length - 1)
        j = i + length
        rows.append(ids[i:j])
    return np.array(rows)


def paper_documents(
    documents: Sequence[str], samples: int, seed: int, length: int, special: bool
) -> np.ndarray:
    """Draw windows as Wanda's loader does from C4."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            encoded = tokenize(documents[i], special)
            if len(encoded) > length:
                break
        i = random.randint(0, len(encoded) - length - 1)
        j = i + length
        rows.append(encoded[i:j])
    return np.array(rows)


def paper_windows(ids: Sequence[int], length: int) -> np.ndarray:
    """Cut windows as the evaluation loop does: tokens i * length to (i + 1) * length."""
    return np.array([ids[i * length : (i + 1) * length] for i in range(len(ids) // length)])
