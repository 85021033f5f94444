"""ADMM against the paper's algorithm in float64 NumPy: rows, matrix, groups, targets, budgets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pruning.types import Pattern
from pruning.weights import admm_core as core
from pruning.weights.patterns import exact_per_matrix, n_of_m, per_row
from reference import admm as reference

DAMP = 0.1
SCOPES = {"row": per_row, "matrix": exact_per_matrix}


@functools.cache
def inputs(channels: int, dead: int | None = None) -> np.ndarray:
    """Mixed inputs [tokens channels], whose norms span a factor of ten."""
    rng = np.random.default_rng(channels)
    mixed = np.eye(channels) + 0.5 * rng.normal(size=(channels, channels)) / np.sqrt(channels)
    x = rng.normal(size=(8 * channels, channels)) @ mixed * np.linspace(0.3, 3, channels)
    if dead is not None:
        x[:, dead] = 0
    return x


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(
    s: core.Settings,
    w: jax.Array,
    total: jax.Array,
    residual: core.Residual | None,
    count: jax.Array,
) -> core.Pruned:
    return core.solve_linear(w, core.prepare(total, DAMP), residual, count, s)


def solved(
    s: core.Settings, w: np.ndarray, x: np.ndarray, fraction: float, target: np.ndarray | None
) -> core.Pruned:
    """The linear pruned toward a target [tokens out], by its sums."""
    residual = None
    if target is not None:
        r = target - x @ w.T
        residual = core.Residual(jnp.float32(r.T @ x), jnp.float32((r**2).sum()))
    count = s.pattern.counts(w.shape, np.asarray(fraction))
    return run(s, w, np.float32(x.T @ x), residual, count)


def settings(pattern: Pattern, scope: str, iterations: int = 20, gradual: bool = True):
    return core.Settings(iterations, pattern, SCOPES[scope], gradual)


def assert_agrees(got: core.Pruned, want: tuple[np.ndarray, np.ndarray]) -> None:
    """The same entries are removed, and the others agree to 1e-4 of the largest weight."""
    w64, gone = want
    assert np.array_equal(~np.asarray(got.kept), gone)
    assert np.array_equal(np.asarray(got.w) == 0, gone)
    np.testing.assert_allclose(got.w, w64, rtol=0, atol=1e-4 * np.abs(w64).max())


def drifted(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A target that the dense linear misses."""
    return (x + 0.3 * np.roll(x, 1, axis=1)) @ w.T.astype(np.float64) + 0.1


@pytest.mark.parametrize("fraction", [0.3, 0.7])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("block", [False, True], ids=["own", "block"])
def test_the_rounds_are_those_of_the_paper(fraction: float, scope: str, block: bool) -> None:
    x, w = inputs(40), matrix(17, 40)
    target = drifted(x, w) if block else None
    got = solved(settings(SCOPES[scope], scope), w, x, fraction, target)
    cross = None if target is None else x.T @ target
    assert_agrees(got, reference.solve(w, x.T @ x, fraction, scope=scope, target=cross))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8)])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_groups_lose_their_lowest_at_different_rounds(n: int, m: int, scope: str) -> None:
    x, w = inputs(40), matrix(17, 40)
    got = solved(settings(n_of_m(n, m), scope), w, x, 0.5, None)
    assert_agrees(got, reference.solve(w, x.T @ x, 0.5, pattern=(n, m), scope=scope))
    gone = ~np.asarray(got.kept)
    assert (gone.reshape(len(gone), -1, m).sum(axis=2) == n).all()


def test_the_released_matrix_branch_knows_no_schedule() -> None:
    x, w = inputs(40), matrix(17, 40)
    got = solved(settings(exact_per_matrix, "matrix", gradual=False), w, x, 0.6, None)
    want = reference.solve(w, x.T @ x, 0.6, scope="matrix", released=True)
    assert_agrees(got, want)
    assert (want[1] != reference.solve(w, x.T @ x, 0.6, scope="matrix")[1]).any()


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_few_rounds_meet_the_budget_too(iterations: int) -> None:
    x, w = inputs(40), matrix(17, 40)
    got = solved(settings(per_row, "row", iterations), w, x, 0.55, None)
    assert_agrees(got, reference.solve(w, x.T @ x, 0.55, iterations=iterations))
    assert ((~np.asarray(got.kept)).sum(axis=1) == 22).all()


def test_a_budget_of_rows_is_kept_by_every_row() -> None:
    x, w = inputs(40), matrix(17, 40)
    fractions = np.linspace(0, 0.93, len(w))
    s = settings(per_row, "row")
    got = run(s, w, np.float32(x.T @ x), None, per_row.counts(w.shape, fractions))
    assert_agrees(got, reference.solve(w, x.T @ x, fractions))
    assert (~np.asarray(got.kept)).sum(axis=1).tolist() == [int(40 * f) for f in fractions]


def test_inputs_that_never_fire_lose_their_weights_first() -> None:
    x, w = inputs(40, dead=5), matrix(17, 40)
    got = solved(settings(per_row, "row"), w, x, 0.3, None)
    assert not np.asarray(got.kept)[:, 5].any()
    assert np.isfinite(got.w).all() and np.isfinite(got.error)


@pytest.mark.parametrize("block", [False, True], ids=["own", "block"])
def test_the_error_is_that_of_the_outputs(block: bool) -> None:
    x, w = inputs(40), matrix(17, 40)
    target = drifted(x, w) if block else x @ w.T
    got = solved(settings(per_row, "row"), w, x, 0.5, target if block else None)
    left = x @ np.asarray(got.w, np.float64).T - target
    assert float(got.error) == pytest.approx((left**2).sum() / (target**2).sum(), rel=1e-4)


def test_a_target_is_met_better_than_by_keeping_the_dense_output() -> None:
    x, w = inputs(40), matrix(17, 40)
    target = drifted(x, w)

    def error(got: core.Pruned) -> float:
        return float(((x @ np.asarray(got.w, np.float64).T - target) ** 2).sum())

    s = settings(per_row, "row")
    assert error(solved(s, w, x, 0.5, target)) < 0.7 * error(solved(s, w, x, 0.5, None))


def test_weights_keep_their_type() -> None:
    x, w = inputs(40), jnp.asarray(matrix(17, 40), jnp.bfloat16)
    s = settings(per_row, "row")
    count = per_row.counts(w.shape, np.asarray(0.5))
    assert run(s, w, np.float32(x.T @ x), None, count).w.dtype == jnp.bfloat16
