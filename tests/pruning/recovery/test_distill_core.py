"""The mathematics of distillation against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.layers import Linear
from pruning.recovery import adamw_core
from pruning.recovery import distill_core as core
from pruning.recovery.zeros import masks_of

RNG = np.random.default_rng(0)
TEACHER, STUDENT = (RNG.normal(0, 3, (2, 3, 7)).astype(np.float32) for _ in range(2))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def merged(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities of some tokens, and the sum of all others."""
    chosen = np.take_along_axis(p, ids, -1)
    return np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)


def loss(student: jax.Array, k: int | None, temperature: float = 1.0) -> jax.Array:
    """Divergence over all tokens, or the teacher's k likeliest."""
    teacher = jnp.asarray(TEACHER) / temperature
    if k is None:
        target, ids = core.log_probabilities(teacher, None), None
    else:
        ids, target = core.likeliest(teacher, k)
    return core.forward_kl(target, core.log_probabilities(student / temperature, ids)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradient_agree_with_float64(temperature: float) -> None:
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(STUDENT), None, temperature)
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, (q - p) / temperature, rtol=1e-4, atol=1e-6)


def test_likeliest_tokens_and_the_rest_agree_with_float64() -> None:
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(STUDENT), 3)
    p, q = softmax(TEACHER), softmax(STUDENT)
    ids = np.argsort(-TEACHER, axis=-1)[..., :3]
    few_p, few_q = merged(p, ids), merged(q, ids)
    np.testing.assert_allclose(value, (few_p * np.log(few_p / few_q)).sum(), rtol=1e-4)
    # A token of the rest is pulled towards the rest's ratio, those that are kept towards their own.
    ratio = np.repeat((few_p / few_q)[..., -1:], 7, axis=-1)
    np.put_along_axis(ratio, ids, (few_p / few_q)[..., :-1], axis=-1)
    np.testing.assert_allclose(gradient, q * (1 - ratio), rtol=1e-3, atol=1e-5)


def test_all_tokens_kept_equal_the_full_loss() -> None:
    few = jax.value_and_grad(loss)(jnp.asarray(STUDENT), 7)
    full = jax.value_and_grad(loss)(jnp.asarray(STUDENT), None)
    np.testing.assert_allclose(few[0], full[0], rtol=1e-6)
    np.testing.assert_allclose(few[1], full[1], rtol=1e-4, atol=1e-6)


def test_a_rest_of_hardly_anything_keeps_a_finite_gradient() -> None:
    sharp = jnp.asarray(STUDENT).at[..., 0].set(200.0)
    ids = jnp.zeros((2, 3, 1), jnp.int32)

    def rest(logits: jax.Array) -> jax.Array:
        return core.log_probabilities(logits, ids)[..., 1].sum()

    value, gradient = jax.value_and_grad(rest)(sharp)
    assert np.isfinite(value) and value < -500
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1


def test_a_new_adapter_changes_nothing_and_a_trained_one_keeps_zeros() -> None:
    w = RNG.normal(size=(6, 5)).astype(np.float32)
    w[RNG.random(w.shape) < 0.5] = 0
    adapter = core.new_adapter(jax.random.key(0), w.shape, 2)
    assert np.array_equal(core.adapted(jnp.asarray(w), adapter), w)
    b = RNG.normal(size=(6, 2)).astype(np.float32)
    trained = core.adapted(jnp.asarray(w), adapter._replace(b=jnp.asarray(b)))
    want = w + (w != 0) * (core.LORA_SCALE * b.astype(np.float64) @ np.asarray(adapter.a))
    np.testing.assert_allclose(trained, want, rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.asarray(trained) == 0, w == 0)


def test_a_step_is_that_of_optax_on_clipped_and_masked_gradients() -> None:
    w = jnp.asarray(RNG.normal(size=(4, 3)) * (RNG.random((4, 3)) < 0.6), jnp.float32)
    gain = jnp.asarray(RNG.normal(size=4), jnp.float32)
    gradients = [jnp.asarray(5 * RNG.normal(size=x.shape), jnp.float32) for x in (w, gain)]
    masked = [jnp.where(w != 0, gradients[0], 0), gradients[1]]
    masks = [masks_of(Linear(w)).w, jnp.ones(4, bool)]
    state = adamw_core.begin([w, gain], (True, True))
    rate, decay = jnp.float32(0.01), jnp.float32(0.1)
    for _ in range(2):
        state = adamw_core.update(state, core.clipped(masked), masks, rate, decay)

    tool = optax.chain(
        optax.clip_by_global_norm(core.CLIP),
        optax.adamw(
            0.01, *adamw_core.BETAS, weight_decay=0.1, mask=lambda p: [x.ndim == 2 for x in p]
        ),
    )
    want, memory = [w, gain], tool.init([w, gain])
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            updates, memory = tool.update(masked, memory, want)
            want = optax.apply_updates(want, updates)
    assert np.abs(np.asarray(masked[0])).max() > core.CLIP
    for x, y in zip(state.masters, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert np.array_equal(np.asarray(state.masters[0]) == 0, np.asarray(w) == 0)
