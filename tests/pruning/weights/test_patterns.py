"""Masks of every pattern against sorting, ties included; counts; and texts of patterns."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from pruning.types import Pattern
from pruning.weights.patterns import (
    n_of_m,
    parse_pattern,
    per_column_block,
    per_matrix,
    per_row,
)
from pruning.weights.patterns_core import value_of_rank
from reference import wanda as reference

FRACTIONS = (0.0, 0.1, 0.29, 0.5, 0.7, 0.99)
CONTINUOUS = np.random.default_rng(0).random((6, 24)).astype(np.float32)
TIED = np.random.default_rng(1).integers(0, 4, (6, 24)).astype(np.float32)  # zeros among them
EQUAL = np.ones((6, 24), np.float32)
SCORES = {"continuous": CONTINUOUS, "tied": TIED, "all equal": EQUAL, "all zero": 0 * EQUAL}
SIGNED = {
    "both signs": CONTINUOUS - 0.5,
    "signs, tied": TIED - 2,
}  # that no method has, but a user's own score may
RANKED = {
    **SCORES,
    "zeros and inf": np.where(TIED == 0, np.float32(np.inf), TIED - 1),
    "all inf": np.float32(np.inf) * EQUAL,
    "denormal": np.float32(1e-45)
    * np.random.default_rng(2).integers(0, 60, (6, 24)).astype(np.float32),
    "every size": (2.0 ** np.random.default_rng(3).uniform(-149, 127.9, (6, 24))).astype(
        np.float32
    ),
    "both signs": np.random.default_rng(4).standard_normal((6, 24)).astype(np.float32),
    "negative": -CONTINUOUS,
    "-inf to inf": np.where(
        TIED == 0, -np.float32(np.inf), np.where(TIED == 3, np.float32(np.inf), TIED - 2)
    ),
    "one": np.full((1, 1), np.float32(0.3)),
    "largest": np.full((6, 24), np.finfo(np.float32).max),
}


def removed(pattern: Pattern, score: np.ndarray, fraction: float | np.ndarray) -> np.ndarray:
    """True where the pattern removes."""
    count = pattern.counts(score.shape, np.asarray(fraction))
    return ~np.asarray(jax.jit(pattern.keep)(jnp.asarray(score), count))


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", SCORES | SIGNED)
def test_per_row_is_a_stable_sort(name: str, fraction: float) -> None:
    score = (SCORES | SIGNED)[name]
    want = reference.removed_per_row(score, np.full(6, int(24 * fraction)))
    assert np.array_equal(removed(per_row, score, fraction), want)


@pytest.mark.parametrize("name", SCORES)
def test_per_row_takes_a_fraction_for_every_row(name: str) -> None:
    fractions = np.array(FRACTIONS)
    # Of equal scores the rightmost go first then, as in NeuroAL's repository.
    want = reference.removed_per_row(
        SCORES[name][:, ::-1], np.array([int(24 * f) for f in FRACTIONS])
    )[:, ::-1]
    assert np.array_equal(removed(per_row, SCORES[name], fractions), want)


# A large matrix of which few entries tie, as weights from float16 do.
HALF = np.random.default_rng(6).standard_normal((64, 96)).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("fraction", FRACTIONS[1:])
@pytest.mark.parametrize("score", [CONTINUOUS, np.abs(HALF)], ids=["continuous", "few ties"])
def test_per_matrix_removes_up_to_a_threshold(score: np.ndarray, fraction: float) -> None:
    got = removed(per_matrix, score, fraction)
    assert np.array_equal(got, reference.removed_per_matrix(score, fraction))


@pytest.mark.parametrize("fraction", FRACTIONS[1:])
@pytest.mark.parametrize("name", [name for name in SCORES if name != "continuous"])
def test_per_matrix_meets_its_budget_where_many_scores_are_equal(
    name: str, fraction: float
) -> None:
    score, count = SCORES[name], int(SCORES[name].size * fraction)
    got = removed(per_matrix, score, fraction)
    # One more where the tie is the threshold's alone, as in the authors' code.
    assert count <= got.sum() <= count + 1
    threshold = np.sort(score.ravel())[count]
    assert got[score < threshold].all() and not got[score > threshold].any()
    if (score == threshold).all():
        assert np.ptp(got.sum(axis=1)) <= 1, "no row gives more than its share"


def test_per_matrix_breaks_the_ties_of_a_wide_matrix_evenly() -> None:
    score = np.where(np.random.default_rng(7).random((200, 300)) < 0.1, 2, 1).astype(np.float32)
    got = removed(per_matrix, score, 0.37)
    assert got.sum() == int(score.size * 0.37) and not got[score == 2].any()
    shares = got.sum(axis=1) / (score == 1).sum(axis=1)
    assert np.ptp(shares) < 2 / 200


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("pattern", [per_row, per_matrix], ids=["per_row", "per_matrix"])
def test_a_count_of_zero_keeps_everything(pattern: Pattern, name: str) -> None:
    assert not removed(pattern, SCORES[name], 0.0).any()


@pytest.mark.parametrize("name", RANKED)
def test_value_of_rank_is_that_of_a_sort(name: str) -> None:
    """To the bit, for every rank: float comparisons may flush denormals to zero."""
    x = RANKED[name]
    assert x.dtype == np.float32
    got = jax.jit(jax.vmap(value_of_rank, (None, 0)))(jnp.asarray(x), jnp.arange(x.size))
    assert np.array_equal(np.asarray(got).view(np.int32), np.sort(x.ravel()).view(np.int32))


@pytest.mark.parametrize("name", RANKED)
def test_value_of_rank_along_an_axis(name: str) -> None:
    """A rank for every row, and for every column."""
    x, rng = RANKED[name], np.random.default_rng(5)
    for axis in (0, 1):
        rank = rng.integers(
            0, x.shape[axis], [1 if k == axis else n for k, n in enumerate(x.shape)]
        )
        got = jax.jit(value_of_rank, static_argnums=2)(jnp.asarray(x), jnp.asarray(rank), axis)
        want = np.take_along_axis(np.sort(x, axis=axis), rank, axis)
        assert np.array_equal(np.asarray(got).view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("columns", [1, 7, 8, 24, 100])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_column_blocks_are_matrices_of_their_own(columns: int, fraction: float) -> None:
    """int(rows * columns * fraction) of each block; the last one is as wide as what is left."""
    pattern = per_column_block(columns)
    counts = pattern.counts((6, 24), np.float64(fraction))
    parts = np.split(CONTINUOUS, range(columns, 24, columns), axis=1)
    assert counts.dtype == np.int32
    assert counts.tolist() == [int(part.size * fraction) for part in parts]
    for part, count in zip(parts, counts, strict=True):
        want = reference.removed_per_matrix(part, fraction) & (count > 0)
        assert np.array_equal(~np.asarray(pattern.keep(jnp.asarray(part), count)), want)


@pytest.mark.parametrize("columns", [1, 7, 8, 24, 100])
def test_rows_lose_their_count_over_all_column_blocks(columns: int) -> None:
    """A row meets its budget whatever its blocks round to; no block loses more than it has."""
    pattern, fractions = per_column_block(columns), np.array(FRACTIONS)
    counts = pattern.counts((6, 24), fractions)
    parts = np.split(CONTINUOUS, range(columns, 24, columns), axis=1)
    assert counts.shape == (len(parts), 6)
    assert counts.sum(axis=0).tolist() == [int(24 * f) for f in FRACTIONS]
    for part, count in zip(parts, counts, strict=True):
        assert np.all((count >= 0) & (count <= part.shape[1]))
        got = ~np.asarray(pattern.keep(jnp.asarray(part), jnp.asarray(count)))
        assert np.array_equal(got, reference.removed_per_row(part, count))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (5, 24)])
@pytest.mark.parametrize("name", SCORES)
def test_n_of_m_removes_exactly_n(name: str, n: int, m: int) -> None:
    got = removed(n_of_m(n, m), SCORES[name], 0.123)
    assert np.all(got.reshape(6, -1, m).sum(axis=2) == n)
    assert np.array_equal(got, reference.removed_n_of_m(SCORES[name], n, m))


def test_kept_scores_are_at_least_the_removed_ones() -> None:
    """The property behind all of them, on scores with ties."""
    for got in (removed(per_row, TIED, 0.6), removed(n_of_m(2, 4), TIED, 0.5)):
        groups = TIED.reshape(6, -1, 24) if got.sum(axis=1)[0] == 14 else TIED.reshape(6, -1, 4)
        gone = got.reshape(groups.shape)
        assert np.all(
            np.where(gone, groups, -np.inf).max(axis=2)
            <= np.where(gone, np.inf, groups).min(axis=2)
        )


@pytest.mark.parametrize("size", [256, 704, 1024, 1536, 4096, 11008])
def test_counts_are_those_of_python(size: int) -> None:
    """`int(size * fraction)` in float64: 0.29 * 100 is 28, and so is the count."""
    for percent in range(100):
        fraction = percent / 100
        assert per_row.counts((3, size), np.float64(fraction)) == int(size * fraction)
        assert per_matrix.counts((3, size), np.float64(fraction)) == int(3 * size * fraction)


def test_counts_of_rows_are_counted_each() -> None:
    fractions = np.array([0.1, 0.29, 0.7])
    got = per_row.counts((3, 100), fractions)
    assert got.dtype == np.int32
    assert got.tolist() == [math.floor(100 * f) for f in fractions] == [10, 28, 70]


def test_one_threshold_cannot_follow_a_budget_of_rows() -> None:
    with pytest.raises(InputError, match="one threshold a matrix cannot follow it: prune by row"):
        per_matrix.counts((6, 24), np.full(6, 0.5))


def test_equal_patterns_are_one_object() -> None:
    """They are static arguments of jit: a fresh one would compile again."""
    assert n_of_m(2, 4) is n_of_m(2, 4)
    assert n_of_m(2, 4).keep is n_of_m(2, 4).keep
    assert per_column_block(128) is per_column_block(128)


@pytest.mark.parametrize("pattern", [per_row, per_matrix], ids=["per_row", "per_matrix"])
def test_one_compilation_serves_every_budget(pattern: Pattern) -> None:
    chex.clear_trace_counter()
    keep = jax.jit(chex.assert_max_traces(lambda score, count: pattern.keep(score, count), n=1))
    for fraction in FRACTIONS:
        keep(jnp.asarray(CONTINUOUS), pattern.counts(CONTINUOUS.shape, np.float64(fraction)))


def test_inputs_must_be_a_multiple_of_m() -> None:
    with pytest.raises(
        InputError, match=r"pattern=2:7 does not fit: 24 inputs .* not a multiple of 7: choose"
    ):
        n_of_m(2, 7).counts((6, 24), np.float64(0.5))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("unstructured", None),
        ("2:4", (2, 4)),
        ("4:8", (4, 8)),
        ("1:2", (1, 2)),
        ("15:16", (15, 16)),
    ],
)
def test_patterns_parse(text: str, want: tuple[int, int] | None) -> None:
    assert parse_pattern(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9:4",
        "4:4",
        "0:4",
        "-1:4",
        "2",
        "2:",
        ":4",
        "2:4:8",
        "2.0:4",
        "two:four",
        "2-4",
        "²:4",
        "Unstructured",
    ],
)
def test_other_patterns_are_bad_input(text: str) -> None:
    with pytest.raises(InputError, match="must be unstructured, or N:M with 0 < N < M such as 2:4"):
        parse_pattern(text)
