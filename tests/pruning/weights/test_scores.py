"""Weight scores against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.observers import SecondMoment, second_moment
from pruning.weights import scores
from pruning.weights.patterns import per_row
from reference import multiflow
from reference import ria as ria_reference
from reference import wanda as reference

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 10)).astype(np.float32)
X = RNG.normal(size=(5, 9, 10)).astype(np.float32) * np.logspace(-2, 2, 10, dtype=np.float32)


@pytest.fixture
def stats() -> SecondMoment:
    """Second moments of X."""
    return second_moment.update(second_moment.init(10), jnp.asarray(X))


def test_magnitude_is_the_absolute_weight() -> None:
    assert np.array_equal(scores.magnitude(jnp.asarray(W), None), np.abs(W))


def test_wanda_agrees_with_numpy(stats: SecondMoment) -> None:
    got = jax.jit(scores.wanda)(jnp.asarray(W), stats)
    np.testing.assert_allclose(got, reference.score(W, reference.scaler_row(X)), rtol=1e-5)


def test_wanda_takes_the_norm_of_the_input_channel(stats: SecondMoment) -> None:
    """Twice the activation of channel 3 is twice its scores, and no other's."""
    louder = stats._replace(total=stats.total.at[3].multiply(4))
    ratio = scores.wanda(jnp.asarray(W), louder) / scores.wanda(jnp.asarray(W), stats)
    np.testing.assert_allclose(
        ratio, np.where(np.arange(10) == 3, 2, 1)[None, :] * np.ones((6, 1)), rtol=1e-6
    )


def test_multiflow_agrees_with_numpy(stats: SecondMoment) -> None:
    got = jax.jit(scores.multiflow)(jnp.asarray(W), stats)
    np.testing.assert_allclose(got, multiflow.score(W, reference.scaler_row(X)), rtol=1e-5)


def test_multiflow_is_not_wanda(stats: SecondMoment) -> None:
    """The flow into a weight counts: one row's small weight lowers its whole channel."""
    w = np.ones((6, 10), np.float32)
    w[3, 9] = 0.01  # the loudest channel carries less for all rows
    got = scores.multiflow(jnp.asarray(w), stats)
    ratio = np.asarray(got[0, 9] / got[0, 8]) / np.sqrt(stats.total[9] / stats.total[8])
    np.testing.assert_allclose(ratio, (5 + 0.01) / 6, rtol=1e-5)


def test_the_flow_out_of_a_row_does_not_rank_its_entries(stats: SecondMoment) -> None:
    """Rows are pruned each on its own, so the masks are those without the flow of the output."""
    score = np.asarray(scores.multiflow(jnp.asarray(W), stats))
    edge = np.abs(W) * np.sqrt(np.asarray(stats.per_sample))
    count = jnp.int32(6)
    without = np.abs(W) * edge.mean(axis=0)
    assert np.array_equal(
        per_row.keep(jnp.asarray(score), count), per_row.keep(jnp.asarray(without), count)
    )


def ria(w: jax.Array, stats: SecondMoment) -> jax.Array:
    """The score with its default power."""
    return scores.ria(w, scores.norm_power(0.5)(stats)[0])


@pytest.mark.parametrize("power", [0.5, 0.0, 1.0])
def test_ria_agrees_with_numpy(stats: SecondMoment, power: float) -> None:
    scale, _ = jax.jit(scores.norm_power(power))(stats)
    got = jax.jit(scores.ria)(jnp.asarray(W), scale)
    want = ria_reference.score(W, reference.scaler_row(X), power)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_ria_of_a_dead_row_column_or_input_is_finite(stats: SecondMoment) -> None:
    w = W.copy()
    w[2], w[:, 4] = 0, 0
    got = np.asarray(ria(jnp.asarray(w), stats._replace(total=stats.total.at[5].set(0))))
    assert np.isfinite(got).all() and not got[2].any() and not got[:, [4, 5]].any()


@pytest.mark.parametrize("score", [scores.magnitude, scores.wanda, scores.multiflow, ria])
def test_scores_are_float32_even_of_bfloat16(score: object, stats: SecondMoment) -> None:
    w = jnp.asarray(W, jnp.bfloat16)
    got = score(w, stats)
    assert got.dtype == jnp.float32
    assert np.array_equal(got, score(w.astype(jnp.float32), stats))


@pytest.mark.parametrize("score", [scores.wanda, scores.multiflow, ria])
def test_scores_follow_a_permutation_of_channels(score: object, stats: SecondMoment) -> None:
    rows, columns = RNG.permutation(6), RNG.permutation(10)
    moved = stats._replace(total=stats.total[columns])
    got = score(jnp.asarray(W[rows][:, columns]), moved)
    np.testing.assert_allclose(got, score(jnp.asarray(W), stats)[rows][:, columns], rtol=1e-6)
