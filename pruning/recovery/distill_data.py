"""Windows of a distillation: those it learns from, those it is judged by, and their order."""

from typing import NamedTuple

import numpy as np

from models.errors import InputError

GRAM = 16  # consecutive tokens that two windows hardly share by chance
SHARED = 0.25  # share of them from which on two windows count as one text
LARGEST_SHARE = 0.25  # of the windows, that are held out at most


class Windows(NamedTuple):
    """Windows in batches.

    Attributes:
      train: Windows that updates are computed from, int32 [batches b t].
      held_out: Windows that no update sees, int32 [batches b t].
      dropped: Windows left out because they share text with a held-out one.
    """

    train: np.ndarray
    held_out: np.ndarray
    dropped: int


def split_windows(ids: np.ndarray, batch: int, held_out: int, seed: int) -> Windows:
    """Divide windows into those to learn from and those to hold out, without common text.

    Args:
      ids: Windows, int [samples length]; they may overlap, as random windows of a text do.
      batch: Windows of a batch.
      held_out: Windows to hold out, of which whole batches are made; a quarter of all at most.
      seed: Decides which.

    Raises:
      InputError: They do not make a batch on each side.
    """
    # In any order: neighbours may be of one text, and a mixture has its sources in order.
    ids = ids[np.random.default_rng(seed).permutation(len(ids))].astype(np.int32)
    most = int(LARGEST_SHARE * len(ids) / batch)
    count = batch * max(1, min(round(held_out / batch), most))
    kept, rest = ids[:count], ids[count:]
    apart = _shared(rest, kept) <= SHARED
    train = rest[apart]
    train = train[: len(train) // batch * batch]
    if not len(train) or len(kept) < batch:
        raise InputError(
            f"leaves distill(batch={batch}) too few windows: {len(ids)} in all, of which {count} "
            f"are held out and {int((~apart).sum())} repeat those",
            "give more text, or a smaller batch",
            field="calibration",
        )
    shape = (-1, batch, ids.shape[1])
    return Windows(train.reshape(shape), kept.reshape(shape), int((~apart).sum()))


def _shared(windows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each window the share of its grams that one of the others has, float [samples]."""
    return np.isin(_grams(windows), np.unique(_grams(others))).mean(axis=1)


def _grams(ids: np.ndarray) -> np.ndarray:
    """Return a number for every run of `GRAM` tokens, uint64 [samples length - GRAM + 1]."""
    size = min(GRAM, ids.shape[1])
    end = ids.shape[1] - size + 1
    numbers = np.zeros((len(ids), end), np.uint64)
    for j in range(size):
        # Overflow wraps: a polynomial modulo 2^64, with an odd factor (Knuth's, for a generator).
        numbers = numbers * np.uint64(6364136223846793005) + ids[:, j : j + end].astype(np.uint64)
    return numbers


def batch_order(batches: int, steps: int, seed: int) -> np.ndarray:
    """Return the batch of every step: all of them in random order, again and again.

    Args:
      batches: Number of batches.
      steps: Number of steps.
      seed: Decides the order.

    Returns:
      Indices of batches, int [steps].
    """
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(batches) for _ in range(-(-steps // batches))]
    return np.concatenate(rounds)[:steps]
