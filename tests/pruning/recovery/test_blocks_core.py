"""The mathematics of block-wise recovery against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import Linear, Norm, linear
from pruning.recovery import adamw_core, zeros
from pruning.recovery import blocks_core as core
from reference.recovery import adamw

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_on_a_linear_are_adamw_of_its_nonzero_entries(decay: float) -> None:
    x = RNG.normal(size=(2, 9, 6)).astype(np.float32)
    target = RNG.normal(size=(2, 9, 4)).astype(np.float32)
    w = RNG.normal(size=(4, 6)).astype(np.float32)
    w[RNG.random(w.shape) < 0.5] = 0
    block = Linear(jnp.asarray(w))
    trained = (True,)
    state = adamw_core.begin(block, trained)
    rates = adamw_core.learning_rates(0.05, 6)

    def loss(masters: list[jax.Array]) -> jax.Array:
        error, size = core.errors("mse", linear(Linear(masters[0]), x), jnp.asarray(target))
        return error / size

    masks = adamw_core.trained_leaves(zeros.masks_of(block), trained)
    for rate in rates:
        gradients = jax.grad(loss)(state.masters)
        state = adamw_core.update(state, gradients, masks, jnp.float32(rate), jnp.float32(decay))
    flat, goal = x.reshape(-1, 6).astype(np.float64), target.reshape(-1, 4).astype(np.float64)
    size = (goal**2).sum()
    want = adamw(
        w, lambda v: 2 * (flat @ v.T - goal).T @ flat / size, [*rates], decay, adamw_core.BETAS
    )
    np.testing.assert_allclose(state.masters[0], want, rtol=1e-4, atol=1e-6)
    assert np.array_equal(np.asarray(state.masters[0]) == 0, w == 0)


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    rates = adamw_core.learning_rates(1.0, 40)
    assert rates[0] == pytest.approx(0.25) and rates[3] == 1.0 and rates.argmax() in (3, 4)
    assert np.all(np.diff(rates[:4]) > 0) and np.all(np.diff(rates[4:]) < 0)
    assert 0 < rates[-1] < 0.05
    assert adamw_core.learning_rates(1.0, 1).tolist() == [1.0]


@pytest.mark.parametrize("loss", ["mse", "token", "cosine"])
def test_losses_agree_with_float64(loss: core.Loss) -> None:
    y, target = (RNG.normal(size=(2, 5, 7)).astype(np.float32) for _ in range(2))
    error, size = core.errors(loss, jnp.asarray(y), jnp.asarray(target))
    a, b = y.astype(np.float64), target.astype(np.float64)
    squares = ((a - b) ** 2).sum(-1)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    want = {
        "mse": squares.sum() / (b**2).sum(),
        "token": (squares / (squares + (b**2).sum(-1))).mean(),
        "cosine": (1 - cosines).mean(),
    }[loss]
    np.testing.assert_allclose(error / size, want, rtol=1e-5)


def test_a_state_that_is_massive_in_one_model_alone_does_not_decide() -> None:
    """The gradient of the other tokens is more than that of a token a thousand times as large."""
    y, target = (jnp.asarray(RNG.normal(size=(1, 5, 7)), jnp.float32) for _ in range(2))
    y = y.at[0, 2].multiply(1000.0)
    gradient = jax.grad(lambda y: core.errors("token", y, target)[0])(y)
    lengths = jnp.linalg.norm(gradient[0], axis=-1)
    assert lengths[2] < 1e-3 * lengths.max()
    assert core.errors("token", y[:, 2:3], target[:, 2:3])[0] <= 1.0


def test_a_bias_is_frozen_where_its_row_was_removed() -> None:
    w = jnp.asarray([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    tree = (Linear(w, jnp.asarray([0.0, 0.0, 1.0])), Norm(jnp.zeros(2)))
    masks = zeros.masks_of(tree)
    assert masks[0].w.tolist() == [[True, False], [False, False], [True, True]]
    assert masks[0].b.tolist() == [True, False, True]
    assert masks[1].scale.tolist() == [True, True]


def test_rounding_makes_no_new_zeros_and_loses_none() -> None:
    old = Linear(jnp.asarray([[1.0, 0.0, 3.0]], jnp.float16))
    new = zeros.keep_zeros(Linear(jnp.asarray([[1e-12, 5.0, 4.0]], jnp.float32)), old)
    assert new.w.dtype == jnp.float16 and new.w.tolist() == [[1.0, 0.0, 4.0]]
    assert zeros.check_zeros(new, old) == 1  # type: ignore[arg-type]
    for lost in ([[1.0, 2.0, 3.0]], [[0.0, 0.0, 3.0]]):
        with pytest.raises(AssertionError, match="1 of them"):
            zeros.check_zeros(Linear(jnp.asarray(lost)), old)  # type: ignore[arg-type]
