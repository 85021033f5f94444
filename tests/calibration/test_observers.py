"""Observers against NumPy in float64, and what they may and may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.observers import (
    BatchNorms,
    Gram,
    Observer,
    SecondMoment,
    batch_norms,
    gram,
    second_moment,
)
from reference.wanda import scaler_row

OBSERVERS = {"second_moment": second_moment, "batch_norms": batch_norms, "gram": gram}
X = np.random.default_rng(0).normal(size=(12, 7, 5)).astype(np.float32) * np.array(
    [1, 10, 0.1, 3, 0], np.float32
)


def fold(
    observer: Observer, x: np.ndarray | jax.Array, sizes: list[int]
) -> SecondMoment | BatchNorms | Gram:
    """The final state after micro-batches of these sizes."""
    state = observer.init(x.shape[-1])
    for part in jnp.split(x, np.cumsum(sizes)[:-1]):
        state = jax.jit(observer.update)(state, part)
    return state


def test_second_moment_is_the_running_mean_of_wanda() -> None:
    state = fold(second_moment, X, [4, 4, 4])
    np.testing.assert_allclose(state.per_sample, scaler_row(X), rtol=1e-5)
    np.testing.assert_allclose(state.total, (X.astype(np.float64) ** 2).sum((0, 1)), rtol=1e-5)
    assert float(state.samples) == len(X)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 5, 2], [2, 10]])
def test_second_moment_does_not_depend_on_batches(sizes: list[int]) -> None:
    np.testing.assert_allclose(fold(second_moment, X, sizes).per_sample, scaler_row(X), rtol=1e-5)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 5, 2]])
def test_second_moment_is_rounded_once_however_many_tokens(sizes: list[int]) -> None:
    """A plain float32 sum is off by four units in the last place and depends on the batches."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(12, 500, 64)) * rng.lognormal(size=(12, 500, 1))).astype(np.float32)
    exact = (x.astype(np.float64) ** 2).sum((0, 1))
    got = np.asarray(fold(second_moment, x, sizes).total)
    assert np.all(np.abs(got - exact) <= 0.6 * np.spacing(exact.astype(np.float32)))
    assert np.array_equal(got, fold(second_moment, x, [6, 6]).total)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 5, 2]])
def test_batch_norms_are_means_of_norms_and_depend_on_batches(sizes: list[int]) -> None:
    parts = np.split(X.astype(np.float64), np.cumsum(sizes)[:-1])
    want = np.mean([np.linalg.norm(p.reshape(-1, p.shape[-1]), axis=0) for p in parts], axis=0)
    np.testing.assert_allclose(fold(batch_norms, X, sizes).mean, want, rtol=1e-5)
    alike = np.allclose(
        fold(batch_norms, X, sizes).mean, fold(batch_norms, X, [6, 6]).mean, rtol=1e-2
    )
    assert not alike  # documented: a norm grows with the tokens in its batch


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 5, 2], [2, 10]])
def test_gram_is_the_sum_of_outer_products_however_batched(sizes: list[int]) -> None:
    """Equal to float32's rounding of the terms: products of two channels may cancel."""
    x = X.astype(np.float64).reshape(-1, X.shape[-1])
    got, size = fold(gram, X, sizes), np.abs(x).T @ np.abs(x)
    assert np.all(np.abs(got.total - sum(np.outer(row, row) for row in x)) <= 1e-6 * size)
    assert np.array_equal(got.total, got.total.T)
    assert float(got.samples) == len(X)


@pytest.mark.parametrize("channels", [1024, 1026])
def test_a_wide_gram_is_whole(channels: int) -> None:
    """Symmetric to the last bit, as factors expect."""
    x = np.random.default_rng(0).normal(size=(2, 3, channels)).astype(np.float32)
    got = gram.update(gram.init(channels), jnp.asarray(x)).total
    flat = x.reshape(-1, channels).astype(np.float64)
    np.testing.assert_allclose(got, flat.T @ flat, atol=1e-5)
    assert np.array_equal(got, got.T)


def test_gram_has_second_moments_on_its_diagonal() -> None:
    got, want = fold(gram, X, [4, 4, 4]), fold(second_moment, X, [4, 4, 4])
    np.testing.assert_allclose(jnp.diagonal(got.total), want.total, rtol=1e-6)


@pytest.mark.parametrize("name", OBSERVERS)
def test_order_of_batches_does_not_matter(name: str) -> None:
    forward, backward = (
        fold(OBSERVERS[name], X, [4, 4, 4]),
        fold(OBSERVERS[name], X[::-1], [4, 4, 4]),
    )
    np.testing.assert_allclose(
        forward.total, backward.total, rtol=1e-6, atol=1e-4 * (name == "gram")
    )  # of totals up to 8000


@pytest.mark.parametrize("name", OBSERVERS)
def test_sums_are_float32_whatever_comes_in(name: str) -> None:
    """Sums kept in bfloat16 would have three digits."""
    x = jnp.asarray(X, jnp.bfloat16)
    got, want = (fold(OBSERVERS[name], part, [4, 4, 4]) for part in (x, x.astype(jnp.float32)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    np.testing.assert_allclose(got.total, want.total, rtol=1e-6)


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_are_hashable_and_silent_channels_stay_zero(name: str) -> None:
    assert hash(OBSERVERS[name]) == hash(Observer(*OBSERVERS[name]))
    total = np.asarray(fold(OBSERVERS[name], X, [12]).total)
    assert not total[4].any()
    assert np.all((np.diagonal(total) if total.ndim == 2 else total)[:4] > 0)
