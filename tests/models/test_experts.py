"""Routing and grouped products equal a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.experts import (
    Expert,
    RouterConfig,
    expert_of,
    lay_out,
    route,
    rows_of_tile,
    run_experts,
)
from models.layers import Linear

DIM, WIDTH = 6, 10


def draw(experts: int, seed: int = 0) -> tuple[Linear, tuple[Expert, ...]]:
    """Return a router and its experts."""
    rng = np.random.default_rng(seed)

    def linear(out: int, into: int) -> Linear:
        return Linear(jnp.asarray(rng.normal(size=(out, into)), jnp.float32))

    parts = (
        Expert(linear(WIDTH, DIM), linear(WIDTH, DIM), linear(DIM, WIDTH)) for _ in range(experts)
    )
    return linear(experts, DIM), tuple(parts)


def reference(
    config: RouterConfig, router: Linear, experts: tuple[Expert, ...], x: np.ndarray
) -> tuple[np.ndarray, list[list[int]]]:
    """Return the outputs [N d] in float64, and the experts of each token, token after token."""
    w = np.asarray(router.w, np.float64)
    y, chosen = np.zeros_like(x), []
    for n, token in enumerate(x):
        shares = np.exp(w @ token - (w @ token).max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[: config.k]
        weights = shares[best] / (shares[best].sum() if config.renormalise else 1.0)
        for weight, e in zip(weights, best, strict=True):
            gate, up, down = (
                np.asarray(getattr(experts[e], name).w, np.float64)
                for name in ("gate", "up", "down")
            )
            gated = gate @ token
            y[n] += weight * (down @ (gated / (1 + np.exp(-gated)) * (up @ token)))
        chosen.append([int(e) for e in best])
    return y, chosen


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("windows", "length", "experts", "k"),
    [(3, 17, 4, 2), (1, 1, 8, 2), (2, 40, 3, 3), (1, 5, 6, 1)],
)
def test_experts_equal_a_loop_over_tokens(
    windows: int, length: int, experts: int, k: int, renormalise: bool
) -> None:
    config, (router, parts) = RouterConfig(k, renormalise), draw(experts)
    x = np.random.default_rng(1).normal(size=(windows, length, DIM))
    want, chosen = reference(config, router, parts, x.reshape(-1, DIM))
    run = jax.jit(lambda x: run_experts(config, router, parts, jax.nn.silu, x))
    y, taps = run(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(np.asarray(y).reshape(-1, DIM), want, rtol=1e-4, atol=1e-4)
    counts = np.bincount(np.concatenate(chosen), minlength=experts)
    np.testing.assert_array_equal(taps["tokens"], counts)


def test_tiles_hold_each_experts_tokens_in_order_and_zeros() -> None:
    config, (router, parts) = RouterConfig(2, renormalise=True), draw(4)
    x = np.random.default_rng(2).normal(size=(3, 11, DIM)).astype(np.float32)
    _, chosen = reference(config, router, parts, x.reshape(-1, DIM).astype(np.float64))
    routed = run_experts(config, router, parts, jax.nn.silu, jnp.asarray(x))[1]["in"]
    rows, present = np.asarray(routed.x), np.asarray(routed.present)
    assert not rows[~present].any()
    for e in range(4):
        own = np.asarray(routed.expert) == e
        tokens = [n for n, experts in enumerate(chosen) if e in experts]
        np.testing.assert_array_equal(rows[own][present[own]], x.reshape(-1, DIM)[tokens])
        windows = np.asarray(routed.window)[own][present[own]]
        np.testing.assert_array_equal(windows, np.array(tokens) // 11)


def test_a_tile_has_as_many_rows_as_experts_have_tokens() -> None:
    assert [rows_of_tile(n, 8) for n in (1, 8, 100, 10**6)] == [1, 1, 8, 128]


def test_every_token_gets_its_own_rows_whatever_the_choice() -> None:
    """All tokens at one expert, and none at most, still have a row each."""
    layout = lay_out(jnp.zeros((50, 1), jnp.int32), 8)
    rows = np.asarray(layout.row).reshape(-1)
    assert len(set(rows.tolist())) == 50
    np.testing.assert_array_equal(np.asarray(layout.token)[rows], np.arange(50))
    assert (np.asarray(layout.expert)[rows // layout.rows] == 0).all()


def test_the_weights_are_of_the_softmax_over_all_experts() -> None:
    router, _ = draw(4)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, DIM)), jnp.float32)
    shares = jax.nn.softmax(x @ router.w.T, axis=-1)
    weights, chosen = route(RouterConfig(2, renormalise=False), router, x)
    np.testing.assert_allclose(weights, np.take_along_axis(np.asarray(shares), chosen, 1))


def test_names_of_experts_parts_are_told_apart() -> None:
    assert expert_of("experts.12.in") == ("experts.in", 12)
    assert expert_of("attn_in") == ("attn_in", None)
    assert expert_of("experts.tokens") == ("experts.tokens", None)
