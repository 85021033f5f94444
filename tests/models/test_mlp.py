"""The perceptron against NumPy in float64, and masked units against units cut out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mlp
from models.layers import Linear

WIDTHS = (6, 9, 7, 4)


@pytest.fixture
def params() -> mlp.Params:
    """Make random weights and biases."""
    rng = np.random.default_rng(0)

    def draw(fan_in: int, out: int) -> Linear:
        return Linear(
            *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((out, fan_in), out))
        )

    return tuple(map(draw, WIDTHS[:-1], WIDTHS[1:]))


@pytest.fixture
def x() -> jax.Array:
    """Make five inputs."""
    return jnp.asarray(np.random.default_rng(2).normal(size=(5, WIDTHS[0])), jnp.float32)


@pytest.fixture
def keeps() -> list[np.ndarray]:
    """Keep about half of each hidden layer."""
    rng = np.random.default_rng(3)
    return [rng.random(width) < 0.5 for width in WIDTHS[1:-1]]


def reference(
    params: mlp.Params, x: jax.Array, keeps: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Compute logits and hidden activations in float64, those of dropped units times zero."""
    h, hidden = np.asarray(x, np.float64), []
    for p, keep in zip(params[:-1], keeps, strict=True):
        h = np.maximum(h @ np.asarray(p.w, np.float64).T + np.asarray(p.b), 0) * keep
        hidden.append(h)
    return h @ np.asarray(params[-1].w, np.float64).T + np.asarray(params[-1].b), hidden


def test_apply_matches_numpy(params: mlp.Params, x: jax.Array) -> None:
    logits, hidden = mlp.apply(params, x)
    expected, activations = reference(params, x, [np.ones(w, bool) for w in WIDTHS[1:-1]])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert [h.shape for h in hidden] == [(5, 9), (5, 7)]
    for h, a in zip(hidden, activations, strict=True):
        np.testing.assert_allclose(h, a, rtol=1e-4, atol=1e-5)
        assert h.min() == 0, (
            "no unit is off for any input: the activations are not taken after the ReLU"
        )


def test_init_has_the_variance_of_he() -> None:
    first, second = mlp.init((500, 400, 300), jax.random.key(0))
    assert (first.w.shape, second.w.shape) == ((400, 500), (300, 400))
    assert float(jnp.var(first.w)) == pytest.approx(2 / 500, rel=0.02)
    assert float(jnp.var(second.w)) == pytest.approx(2 / 400, rel=0.02)
    assert not first.b.any() and not second.b.any()


def test_init_is_reproducible_and_layers_differ() -> None:
    a, b, c = (mlp.init((4, 4, 4), jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a[0].w, b[0].w)
    assert (a[0].w != c[0].w).all() and (a[0].w != a[1].w).all()


def test_mask_silences_the_dropped_units(
    params: mlp.Params, x: jax.Array, keeps: list[np.ndarray]
) -> None:
    logits, hidden = mlp.apply(mlp.mask(params, keeps), x)
    np.testing.assert_allclose(logits, reference(params, x, keeps)[0], rtol=1e-4, atol=1e-5)
    for h, keep in zip(hidden, keeps, strict=True):
        assert not h[:, ~keep].any() and h[:, keep].any()


def test_a_cut_network_has_the_logits_of_the_masked_one(
    params: mlp.Params, x: jax.Array, keeps: list[np.ndarray]
) -> None:
    small = mlp.cut(params, keeps)
    a, b = (int(keep.sum()) for keep in keeps)
    assert 0 < a < 9 and 0 < b < 7
    assert [p.w.shape for p in small] == [(a, 6), (b, a), (4, b)]
    assert [p.b.shape for p in small] == [(a,), (b,), (4,)]
    np.testing.assert_allclose(
        mlp.apply(small, x)[0], mlp.apply(mlp.mask(params, keeps), x)[0], rtol=1e-5, atol=1e-5
    )


def test_keeping_everything_changes_no_bit(params: mlp.Params) -> None:
    everything = [np.ones(w, bool) for w in WIDTHS[1:-1]]
    for change in (mlp.cut, mlp.mask):
        jax.tree.map(np.testing.assert_array_equal, change(params, everything), params)


def test_cut_and_mask_work_without_biases(
    params: mlp.Params, x: jax.Array, keeps: list[np.ndarray]
) -> None:
    bare = tuple(Linear(p.w) for p in params)
    small, silent = mlp.cut(bare, keeps), mlp.mask(bare, keeps)
    assert all(p.b is None for p in (*small, *silent))
    np.testing.assert_allclose(
        mlp.apply(small, x)[0], mlp.apply(silent, x)[0], rtol=1e-5, atol=1e-5
    )


def test_masks_share_one_compilation(params: mlp.Params, x: jax.Array) -> None:
    traces = 0

    @jax.jit
    def logits(keeps: list[jax.Array]) -> jax.Array:
        nonlocal traces
        traces += 1
        return mlp.apply(mlp.mask(params, keeps), x)[0]

    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits([rng.random(w) < 0.5 for w in WIDTHS[1:-1]])
    assert traces == 1


def test_a_missing_mask_is_refused(params: mlp.Params, keeps: list[np.ndarray]) -> None:
    for change in (mlp.cut, mlp.mask):
        with pytest.raises((ValueError, IndexError)):
            change(params, keeps[:1])
