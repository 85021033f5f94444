"""The stories as tokens: batches without a gap, decided by the seed."""

import itertools

import numpy as np

from calibration.stories import tokens
from calibration.stories.generator import stream


def test_batches_are_the_stream_without_a_gap() -> None:
    tokenizer = tokens.train_tokenizer(300, seed=0)
    batches = itertools.islice(tokens.batches(tokenizer, "train", 2, (3, 64)), 300)
    got = np.concatenate([batch.ravel() for batch in batches])
    expected: list[int] = []
    for story in stream("train", 2):
        if len(expected) > got.size:
            break
        expected += [1, *tokenizer.encode(story, add_special_tokens=False).ids]
    assert got.size > tokens.STORIES_PER_READ * 200, "the test should cross a read"
    np.testing.assert_array_equal(got, expected[: got.size])


def test_the_seed_decides_the_batches() -> None:
    tokenizer = tokens.train_tokenizer(300, seed=0)
    first, again, other = (
        next(tokens.batches(tokenizer, "train", seed, (2, 32))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
