"""The data recipes of SparseGPT (`datautils.py`) and Wanda (`lib/data.py`), ported for the tests.

They call the functions of the module `random` in the official order. The tokenizer has one token a
byte. `calibrate` and `evaluate` load the same data through `calibration.data`.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from calibration.data import Tokens, calibration_tokens, evaluation_tokens

BOS, VOCAB = 256, 257


def tokenize(text: str, special: bool = False) -> list[int]:
    """Return one token a byte, after a BOS if special tokens are asked for."""
    ids = list(text.encode())
    return [BOS, *ids] if special else ids


def calibrate(source: object, **changes: Any) -> Tokens:
    """Load a few windows to calibrate on; `changes` replace the defaults."""
    settings = {"samples": 5, "length": 32, "seed": 0, "vocab": VOCAB} | changes
    return calibration_tokens(str(source), lambda: tokenize, **settings)


def evaluate(source: object, **changes: Any) -> Tokens:
    """Load all windows to evaluate on; `changes` replace the defaults."""
    settings = {"length": 32, "windows": 0, "vocab": VOCAB} | changes
    return evaluation_tokens(str(source), lambda: tokenize, **settings)


def texts(count: int, longest: int, seed: int = 7) -> list[str]:
    """Make documents of 0 to `longest` bytes, without two equal windows."""
    draw = random.Random(seed)
    return [
        "".join(draw.choices("abcdefghij klmno\n", k=draw.randint(0, longest)))
        for _ in range(count)
    ]


def paper_stream(ids: Sequence[int], samples: int, seed: int, length: int) -> np.ndarray:
    """Draw windows as the loaders of SparseGPT and Wanda draw them from WikiText-2 and PTB."""
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
    """Draw windows as Wanda's loader draws them from C4."""
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
    """Cut windows as the evaluation loop: window i is tokens i * length to (i + 1) * length."""
    return np.array([ids[i * length : (i + 1) * length] for i in range(len(ids) // length)])
