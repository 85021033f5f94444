"""Weight scores against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.observers import SecondMoment, second_moment
from pruning import scores
from reference import wanda as reference

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 10)).astype(np.float32)
X = RNG.normal(size=(5, 9, 10)).astype(np.float32) * np.logspace(-2, 2, 10, dtype=np.float32)


@pytest.fixture
def stats() -> SecondMoment:
    """Second moments of X."""
    return second_moment.update(second_moment.init(10), jnp.asarray(X))


def test_magnitude() -> None:
    assert np.array_equal(scores.magnitude(jnp.asarray(W), None), np.abs(W))


def test_wanda(stats: SecondMoment) -> None:
    got = jax.jit(scores.wanda)(jnp.asarray(W), stats)
    np.testing.assert_allclose(got, reference.score(W, reference.scaler_row(X)), rtol=1e-5)


def test_wanda_takes_the_norm_of_the_input_channel(stats: SecondMoment) -> None:
    """Twice the activation of channel 3 is twice its scores, and no other's."""
    louder = stats._replace(total=stats.total.at[3].multiply(4))
    ratio = scores.wanda(jnp.asarray(W), louder) / scores.wanda(jnp.asarray(W), stats)
    np.testing.assert_allclose(ratio, np.where(np.arange(10) == 3, 2, 1)[None, :] * np.ones((6, 1)), rtol=1e-6)


@pytest.mark.parametrize("score", [scores.magnitude, scores.wanda])
def test_scores_are_float32_even_of_bfloat16(score: object, stats: SecondMoment) -> None:
    w = jnp.asarray(W, jnp.bfloat16)
    got = score(w, stats)
    assert got.dtype == jnp.float32
    assert np.array_equal(got, score(w.astype(jnp.float32), stats))


def test_scores_follow_a_permutation_of_channels(stats: SecondMoment) -> None:
    rows, columns = RNG.permutation(6), RNG.permutation(10)
    moved = stats._replace(total=stats.total[columns])
    got = scores.wanda(jnp.asarray(W[rows][:, columns]), moved)
    np.testing.assert_allclose(got, scores.wanda(jnp.asarray(W), stats)[rows][:, columns], rtol=1e-6)
