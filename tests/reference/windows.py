"""Short windows from `calibration.data`, with the byte tokenizer of `reference.loaders`."""

from typing import Any

from calibration.data import Tokens, calibration_tokens, evaluation_tokens
from reference.loaders import VOCAB, tokenize


def calibrate(source: object, **changes: Any) -> Tokens:
    """Load a few windows to calibrate on; `changes` replace the defaults."""
    settings = {"samples": 5, "length": 32, "seed": 0, "vocab": VOCAB} | changes
    return calibration_tokens(str(source), lambda: tokenize, **settings)


def evaluate(source: object, **changes: Any) -> Tokens:
    """Load all windows to evaluate on; `changes` replace the defaults."""
    settings = {"length": 32, "windows": 0, "vocab": VOCAB} | changes
    return evaluation_tokens(str(source), lambda: tokenize, **settings)
