"""Windows of a distillation: held-out text is seen by no update."""

import numpy as np
import pytest

from models.errors import InputError
from pruning.recovery.distill_data import batch_order, split_windows

RNG = np.random.default_rng(0)


def test_windows_that_overlap_a_held_out_one_are_left_out() -> None:
    texts = RNG.integers(0, 50, (40, 96))
    # Two windows of every text, which share half of their tokens.
    ids = np.concatenate([texts[:, :64], texts[:, 32:]])
    windows = split_windows(ids, 4, 8, seed=0)
    assert windows.held_out.shape == (2, 4, 64) and windows.train.shape[1:] == (4, 64)
    held = {text.tobytes() for text in windows.held_out.reshape(-1, 64)}
    halves = {ids[k].astype(np.int32).tobytes(): k % 40 for k in range(80)}
    of_train = {halves[w.tobytes()] for w in windows.train.reshape(-1, 64)}
    assert not of_train & {halves[w] for w in held}
    # The other windows of the texts of eight that are held out, less pairs that are held out both.
    assert windows.dropped == 2 * len({halves[w] for w in held}) - 8


def test_a_quarter_of_the_windows_is_held_out_at_most() -> None:
    ids = RNG.integers(0, 50, (20, 32))
    assert split_windows(ids, 2, 100, 0).held_out.shape == (2, 2, 32)
    assert split_windows(ids, 2, 1, 0).held_out.shape == (1, 2, 32)


@pytest.mark.parametrize("ids", [np.zeros((9, 32), int), RNG.integers(0, 50, (3, 32))])
def test_text_that_leaves_no_batch_is_refused(ids: np.ndarray) -> None:
    with pytest.raises(InputError, match="too few windows"):
        split_windows(ids, 2, 4, 0)


def test_every_batch_is_read_once_before_any_is_read_again() -> None:
    order = batch_order(5, 12, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4] and len(order) == 12
    assert not np.array_equal(order[:5], order[5:10])
    assert np.array_equal(order, batch_order(5, 12, seed=3))
