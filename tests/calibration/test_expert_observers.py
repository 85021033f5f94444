"""Statistics of experts equal those of a dense observer over the tokens that each one got."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.moments import moments
from calibration.observers import (
    Observer,
    batch_norms,
    fading_second_moment,
    gram,
    pair,
    second_moment,
)
from calibration.passes import observe
from calibration.states import States
from models.arch import Model, embed
from models.experts import EXPERT_TOKENS, expert_of, route
from pruning.weights.expert_tokens import with_token_counts
from reference.small import model, tokens

FAMILY = "olmoe"


@functools.cache
def inputs() -> tuple[Model, list[jax.Array], list[np.ndarray], list[np.ndarray]]:
    """Return a model, its embedded windows, and the first block's router inputs and choices."""
    m = model(FAMILY)
    xs = [embed(m.arch, m.non_block, tokens(samples=n, seed=n)) for n in (4, 3)]
    into, chosen = [], []
    for x in xs:
        taps = m.arch.block(m.blocks[0], x)[1]
        into.append(np.asarray(taps["mlp_in"], np.float64))
        flat = taps["mlp_in"].reshape(-1, x.shape[-1])
        chosen.append(np.asarray(route(m.arch.config.static.router, m.blocks[0].router, flat)[1]))
    return m, xs, into, chosen


def of_expert(e: int, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the tokens [n c] of a micro-batch that an expert got."""
    return x.reshape(-1, x.shape[-1])[(chosen == e).any(axis=1)]


def seen(observer: Observer) -> dict[str, object]:
    """Return the statistics of every expert's input in the first block."""
    m, xs, _, _ = inputs()
    watch = {s.reads: observer for s in m.arch.slots if s.name.endswith("up")}
    return dict(observe(m.arch, with_token_counts(watch), 0, m.blocks[0], States(xs, "device")))


OTHERS = (second_moment, fading_second_moment, moments)


@pytest.mark.parametrize(
    "observer", [gram, *(pytest.param(o, marks=pytest.mark.slow) for o in OTHERS)]
)
def test_experts_statistics_are_those_of_their_tokens(observer: Observer) -> None:
    _, _, into, chosen = inputs()
    stats = seen(pair(observer, second_moment))
    for e in range(4):
        state = stats[f"experts.{e}.in"][0]
        rows = np.concatenate([of_expert(e, x, c) for x, c in zip(into, chosen, strict=True)])
        windows = sum(map(len, into))
        if observer is gram:
            np.testing.assert_allclose(state.total, rows.T @ rows, rtol=1e-4, atol=1e-4)
            assert state.samples == windows
        elif observer is moments:
            np.testing.assert_allclose(state.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.variance, rows.var(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.length * state.second.samples, len(rows), rtol=1e-6)
        elif observer is second_moment:
            np.testing.assert_allclose(state.total, (rows**2).sum(0), rtol=1e-5)
        else:
            first, weights = 0, []
            for x, c in zip(into, chosen, strict=True):
                got = (c == e).any(axis=1).reshape(x.shape[:2])
                nth = first + 1 + np.repeat(np.arange(len(x)), x.shape[1]).reshape(x.shape[:2])
                weights.append((2 / nth)[got])
                first += len(x)
            weighted = (rows**2 * np.concatenate(weights)[:, None]).sum(0)
            np.testing.assert_allclose(state.total, weighted, rtol=1e-5)
        assert stats[EXPERT_TOKENS][e] == len(rows)


def test_batch_norms_of_experts_are_means_over_micro_batches() -> None:
    _, _, into, chosen = inputs()
    stats = seen(batch_norms)
    for e in range(4):
        norms = [
            np.linalg.norm(of_expert(e, x, c), axis=0) for x, c in zip(into, chosen, strict=True)
        ]
        np.testing.assert_allclose(stats[f"experts.{e}.in"].mean, np.mean(norms, 0), rtol=1e-5)


def test_parts_that_a_block_lacks_are_not_observed() -> None:
    m = model("qwen3_moe")  # whose second block has no experts
    xs = States([embed(m.arch, m.non_block, tokens())], "device")
    watch = {s.reads: second_moment for s in m.arch.slots}
    with_experts, without = (observe(m.arch, watch, i, m.blocks[i], xs) for i in (0, 1))
    assert "mlp_mid" not in with_experts and "experts.0.mid" in with_experts
    assert {expert_of(tap)[1] for tap in without} == {None} and "mlp_mid" in without


def test_an_observer_without_a_form_for_experts_is_refused() -> None:
    m, xs, _, _ = inputs()
    plain = Observer(jnp.zeros, lambda state, x: state + jnp.sum(x, axis=(0, 1)))
    with pytest.raises(ValueError, match="tokens of experts"):
        observe(m.arch, {"experts.0.in": plain}, 0, m.blocks[0], States(xs, "device"))
