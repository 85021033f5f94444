"""Repairs of readers: the bias keeps the mean output, and the refit is least squares."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.arch import embed
from models.layers import Linear
from pruning.structured import repair_core
from reference import flap as reference
from reference.small import FAMILIES, model, run_block, tokens

RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 6)).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["heads", "neurons"])
def test_the_bias_keeps_the_mean_output(name: str, family: str) -> None:
    m = model(family)
    group = m.arch.group(name)
    tap = next(s.reads for s in m.arch.slots if s.name == group.reader.name)
    _, taps = run_block(m, m.blocks[0], embed(m.arch, m.non_block, tokens()))
    x, p = taps[tap].reshape(-1, taps[tap].shape[-1]), getattr(m.blocks[0], group.reader.name)
    keep = RNG.random(x.shape[1]) < 0.6
    new = repair_core.add_lost_mean(p, jnp.asarray(x.mean(0), jnp.float32), jnp.asarray(keep))
    dense = x @ np.asarray(p.w, np.float64).T + (0 if p.b is None else np.asarray(p.b, np.float64))
    left = (x * keep) @ np.asarray(new.w, np.float64).T + np.asarray(new.b, np.float64)
    np.testing.assert_allclose(left.mean(0), dense.mean(0), atol=1e-4)
    assert np.array_equal(new.w, p.w)


def test_the_refit_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without much of a ridge it equals NumPy's; with the default it still beats the bias alone."""
    x = RNG.normal(size=(400, 12)) @ RNG.normal(size=(12, 12)) + 1
    w, keep = RNG.normal(size=(5, 12)), np.arange(12) % 3 > 0
    arrays = [jnp.asarray(a, jnp.float32) for a in (x.T @ x, x.mean(0), np.float32(400))]
    p = Linear(jnp.asarray(w, jnp.float32), jnp.ones(5))
    want, b = reference.refit(w, x, keep)

    def error(q: Linear) -> float:
        return float(
            np.square((x * keep) @ np.asarray(q.w).T + np.asarray(q.b) - x @ w.T - 1).mean()
        )

    fitted, alone = (
        repair_core.refit_kept_columns(p, *arrays, jnp.asarray(keep)),
        repair_core.add_lost_mean(p, arrays[1], jnp.asarray(keep)),
    )
    assert error(fitted) < 0.7 * error(alone)
    monkeypatch.setattr(repair_core, "RIDGE", 1e-7)
    exact = repair_core.refit_kept_columns(p, *arrays, jnp.asarray(keep))
    np.testing.assert_allclose(exact.w, want, atol=2e-3)
    np.testing.assert_allclose(exact.b, b + 1, atol=2e-2)


def test_the_refit_without_a_bias_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(size=(400, 12)) @ RNG.normal(size=(12, 12)) + 1
    w, keep = RNG.normal(size=(5, 12)), np.arange(12) % 3 > 0
    monkeypatch.setattr(repair_core, "RIDGE", 1e-7)
    # Means of zero leave the products as they are, so that the bias has nothing to make up for.
    total, tokens_seen = jnp.asarray(x.T @ x, jnp.float32), jnp.float32(400)
    p = Linear(jnp.asarray(w, jnp.float32))
    got = repair_core.refit_kept_columns(p, total, jnp.zeros(12), tokens_seen, jnp.asarray(keep))
    want = np.zeros_like(w)
    want[:, keep] = np.linalg.lstsq(x[:, keep], x @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(got.w, want, atol=2e-3)
    assert not np.any(got.b)


def test_the_refit_changes_nothing_where_nothing_is_removed() -> None:
    x = RNG.normal(size=(50, 6))
    p = Linear(jnp.asarray(W))
    got = repair_core.refit_kept_columns(
        p, *(jnp.asarray(a, jnp.float32) for a in (x.T @ x, x.mean(0), 50.0)), jnp.ones(6, bool)
    )
    assert np.array_equal(got.w, W) and not np.asarray(got.b).any()


def test_grails_ridge_is_the_refits_less_a_pull_to_zero() -> None:
    """GRAIL's W G_K (G_KK + l)^-1 at the refit's own ridge, in float64 (docs/methods/refit.md)."""
    x = RNG.normal(size=(400, 12)) @ RNG.normal(size=(12, 12)) + 1
    w, keep = RNG.normal(size=(5, 12)), np.arange(12) % 3 > 0
    g = x.T @ x / 400
    kept = g[np.ix_(keep, keep)]
    ridge = repair_core.RIDGE * np.diag(kept).mean()
    inverse = np.linalg.inv(kept + ridge * np.eye(len(kept)))
    grail = w @ g[:, keep] @ inverse
    total, zero, tokens_seen = x.T @ x, np.zeros(12), np.float32(400)
    arrays = [jnp.asarray(a, jnp.float32) for a in (total, zero, tokens_seen)]
    fitted = repair_core.refit_kept_columns(
        Linear(jnp.asarray(w, jnp.float32)), *arrays, jnp.asarray(keep)
    )
    want = np.asarray(fitted.w)[:, keep] - ridge * w[:, keep] @ inverse
    np.testing.assert_allclose(grail, want, rtol=1e-3, atol=1e-4)
