"""Errors of refits against float64 fits of every number of units, and what compares blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from pruning.structured import refit_errors_core as core
from pruning.structured.repair_core import RIDGE

TOKENS = 300


def problem(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [out in], and inputs of which some depend on others [tokens in]."""
    rng = np.random.default_rng(channels)
    mixed = rng.normal(size=(TOKENS, channels)) @ rng.normal(0, channels**-0.5, (channels,) * 2)
    return rng.normal(size=(7, channels)).astype(np.float32), (mixed + 0.5).astype(np.float32)


def port(w: np.ndarray, x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Errors of a fit, with the ridge on all channels, without the first of the order, [in + 1]."""
    w = w.astype(np.float64)
    c = np.cov(x.T.astype(np.float64), bias=True)
    c += RIDGE * np.diag(c).mean() * np.eye(len(c))
    errors = []
    for gone in range(len(order) + 1):
        k = order[gone:]
        fitted = np.linalg.solve(c[np.ix_(k, k)], c[k] @ w.T)
        errors.append(np.trace(w @ c @ w.T - w @ c[:, k] @ fitted))
    return np.asarray(errors)


@pytest.mark.parametrize("channels", [12, pytest.param(80, marks=pytest.mark.slow)])
def test_added_errors_sum_to_the_errors_of_fits(channels: int) -> None:
    w, x = problem(channels)
    order = np.random.default_rng(1).permutation(channels)
    arrays = (jnp.asarray(a) for a in (w, x.T @ x, x.mean(axis=0), np.float32(TOKENS), order))
    added = np.asarray(core.added_errors(*arrays), np.float64)
    want = port(w, x, order)
    np.testing.assert_allclose(np.cumsum(added), want[1:], rtol=2e-3)
    assert want[0] == pytest.approx(0, abs=1e-9 * want[-1])


def test_taking_the_lowest_of_all_blocks_leaves_the_least_error() -> None:
    """Against every split of the units that lies on the convex curves."""
    rng = np.random.default_rng(0)
    blocks = [rng.exponential(size=9) * scale for scale in (1.0, 3.0, 0.5)]
    orders = [rng.permutation(9) for _ in blocks]
    scores = [core.comparable_errors(a, o) for a, o in zip(blocks, orders, strict=True)]
    for block, order, own in zip(blocks, orders, scores, strict=True):
        assert (np.diff(own[order]) >= 0).all(), "of two units the worse goes first"
        assert own.sum() == pytest.approx(block.sum(), rel=1e-6)
    flat = np.concatenate(scores)
    where = np.repeat(np.arange(3), 9)
    for count in range(1, 27):
        taken = np.bincount(where[np.argsort(flat, kind="stable")[:count]], minlength=3)
        hulls = [np.cumsum(np.r_[0, s[o]]) for s, o in zip(scores, orders, strict=True)]
        found = sum(h[k] for h, k in zip(hulls, taken, strict=True))
        least = min(
            hulls[0][a] + hulls[1][b] + hulls[2][count - a - b]
            for a in range(10)
            for b in range(10)
            if 0 <= count - a - b <= 9
        )
        assert found == pytest.approx(least, rel=1e-6, abs=1e-9)


def test_the_stream_is_measured_token_by_token() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    x[0, 3] = 0  # counts for nothing
    squares = (x.astype(np.float64) ** 2).mean(axis=-1)
    assert core.stream_inverse(jnp.asarray(x)) == pytest.approx(
        (1 / squares[squares > 0]).sum(), rel=1e-5
    )
