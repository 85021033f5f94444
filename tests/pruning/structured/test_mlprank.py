"""MLPRank against a float64 NumPy port of the papers' formulas, and symmetries of a ranking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import mlp
from models.errors import InputError
from models.layers import Linear
from pruning.structured import mlprank
from pruning.structured.page_rank_core import SCORERS, Scorer

WIDTHS = (8, 12, 10, 11, 3)
VARIANTS = {
    "wpr": mlprank.wpr(),
    "wpr unweighted": mlprank.wpr(gamma=0.5, theta=0.0),
    "wpr weighted": mlprank.wpr(gamma=1.0, theta=1.0),
    "mpr": mlprank.mpr(),
    "mpr zeroed": mlprank.mpr(zeroed=0.35),
    "norm": mlprank.MAKERS["norm"](),
    "activation": mlprank.MAKERS["activation"](),
    "wanda": mlprank.MAKERS["wanda"](),
}


@pytest.fixture
def params() -> mlp.Params:
    """Make a network; a fifth of the weights are zero, so the unweighted graph is not complete."""
    rng = np.random.default_rng(0)

    def draw(fan_in: int, out: int) -> Linear:
        w = rng.normal(size=(out, fan_in)) * (rng.random((out, fan_in)) > 0.2)
        return Linear(
            jnp.asarray(w, jnp.float32), jnp.asarray(rng.normal(size=out) / 2, jnp.float32)
        )

    return tuple(map(draw, WIDTHS[:-1], WIDTHS[1:]))


@pytest.fixture
def sample() -> mlprank.Sample:
    """Make twenty inputs of unequal scale."""
    x = np.random.default_rng(1).normal(size=(20, WIDTHS[0])) * np.linspace(0.2, 3, WIDTHS[0])
    return mlprank.Sample(jnp.asarray(x, jnp.float32), jax.random.key(6))


def step(
    name: str, w: np.ndarray, prev: np.ndarray, a_in: np.ndarray, a_out: np.ndarray
) -> np.ndarray:
    """Compute one layer's importance by explicit sums over edges, not normalised."""
    match name.split():
        case ["norm"]:
            return np.array([sum(row) for row in w])
        case ["activation"]:
            return a_out
        case ["wanda"]:
            return np.array([sum(row[j] * a_in[j] for j in range(len(row))) for row in w])
        case ["mpr", *zeroed]:
            passed_on = prev.copy()
            if zeroed:
                passed_on[np.argsort(prev, kind="stable")[: int(0.35 * len(prev))]] = 0
            return (
                np.array([sum(row[j] * passed_on[j] for j in range(len(row))) for row in w]) * a_out
            )
        case ["wpr", *kind]:
            gamma, theta = (
                {"unweighted": (0.5, 0.0), "weighted": (1.0, 1.0)}[kind[0]] if kind else (0.9, 0.5)
            )
            graph = np.zeros(len(w))
            for j, passed_on in enumerate(prev):
                linked = w[:, j] > 0
                if linked.any():
                    graph += passed_on * (
                        theta * w[:, j] / w[:, j].sum() + (1 - theta) * linked / linked.sum()
                    )
            return gamma * graph + (1 - gamma) * a_out / a_out.sum()
    raise AssertionError(name)


def reference(name: str, params: mlp.Params, x: np.ndarray) -> list[np.ndarray]:
    """Compute every hidden layer's importance in float64."""
    h, prev = x, np.sqrt((x**2).sum(0))
    importances = []
    for p in params[:-1]:
        a_in = np.sqrt((h**2).sum(0))
        h = np.maximum(h @ np.asarray(p.w, np.float64).T + np.asarray(p.b, np.float64), 0)
        score = step(
            name,
            np.abs(np.asarray(p.w, np.float64)),
            prev / prev.sum(),
            a_in,
            np.sqrt((h**2).sum(0)),
        )
        prev = score / score.sum()
        importances.append(prev)
    return importances


@pytest.mark.parametrize("name", VARIANTS)
def test_importance_matches_the_port(name: str, params: mlp.Params, sample: mlprank.Sample) -> None:
    importances = mlprank.importance(VARIANTS[name], params, sample)
    expected = reference(name, params, np.asarray(sample.x, np.float64))
    assert len(importances) == len(expected) == 3
    for got, want in zip(importances, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_the_variants_rank_differently(params: mlp.Params, sample: mlprank.Sample) -> None:
    """Otherwise the comparison with the port could not tell formulas apart."""
    last = [
        np.asarray(mlprank.importance(score, params, sample)[-1]) for score in VARIANTS.values()
    ]
    for i, a in enumerate(last):
        assert all(np.abs(a - b).max() > 0.01 / len(a) for b in last[:i])


@pytest.mark.parametrize("score", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize("layer", range(3))
def test_importance_follows_a_permutation_of_units(
    score: Scorer, layer: int, params: mlp.Params, sample: mlprank.Sample
) -> None:
    order = np.random.default_rng(layer).permutation(WIDTHS[layer + 1])
    moved = list(params)
    moved[layer] = params[layer].replace(w=params[layer].w[order], b=params[layer].b[order])
    moved[layer + 1] = params[layer + 1].replace(w=params[layer + 1].w[:, order])
    before, after = (mlprank.importance(score, tuple(p), sample) for p in (params, moved))
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        np.testing.assert_allclose(b, a[order] if i == layer else a, rtol=1e-5)


def test_wpr_without_graph_is_the_activation_baseline(
    params: mlp.Params, sample: mlprank.Sample
) -> None:
    graphless, activation = (
        mlprank.importance(s, params, sample)
        for s in (mlprank.wpr(gamma=0.0), VARIANTS["activation"])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), graphless, activation)


def test_random_scores_depend_on_the_key_alone(params: mlp.Params, sample: mlprank.Sample) -> None:
    score = mlprank.MAKERS["random"]()
    a = mlprank.importance(score, params, sample)
    b = mlprank.importance(score, params, sample._replace(x=2 * sample.x))
    c = mlprank.importance(score, params, sample._replace(key=jax.random.key(7)))
    for x, y, z in zip(a, b, c, strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).all()
    # With one draw for both layers, these would be multiples of each other.
    first, second = a[0][:10], a[1]
    assert np.abs(first / first.sum() - second / second.sum()).max() > 1e-3


def test_a_dead_layer_leaves_every_score_finite(params: mlp.Params, sample: mlprank.Sample) -> None:
    """A layer that never fires passes on nothing. No layer behind it becomes NaN."""
    dead = (
        params[0],
        params[1].replace(w=0 * params[1].w, b=-jnp.ones_like(params[1].b)),
        *params[2:],
    )
    for score in VARIANTS.values():
        assert all(np.isfinite(a).all() for a in mlprank.importance(score, dead, sample))


def test_equal_scorers_share_one_compilation(params: mlp.Params, sample: mlprank.Sample) -> None:
    mlprank.importance(mlprank.wpr(gamma=0.25), params, sample)
    compiled = mlprank.importance._cache_size()
    mlprank.importance(mlprank.wpr(gamma=0.25), jax.tree.map(lambda a: a + 1, params), sample)
    assert mlprank.importance._cache_size() == compiled


def test_every_scorer_has_a_maker() -> None:
    assert set(mlprank.MAKERS) == set(SCORERS)


@pytest.mark.parametrize(
    "arguments", [{"gamma": -0.1}, {"gamma": 1.1}, {"theta": 2}, {"theta": float("nan")}]
)
def test_shares_outside_zero_to_one_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        mlprank.wpr(**arguments)


@pytest.mark.parametrize("zeroed", [-0.1, 1.0, float("nan")])
def test_zeroing_everything_is_refused(zeroed: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        mlprank.mpr(zeroed=zeroed)
