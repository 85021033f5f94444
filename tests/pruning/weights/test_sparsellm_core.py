"""SparseLLM's step on the input of an activation, for every activation with and without a gate."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import ACTIVATIONS
from pruning.weights import sparsellm_core as core
from reference import sparsellm as reference

PENALTIES = core.Penalties(0.3, 2.0, 0.7)
SMOOTH = sorted(set(ACTIVATIONS) - {"relu"})


def normal(seed: int, scale: float = 1.0) -> np.ndarray:
    """4000 random numbers, float32."""
    return np.random.default_rng(seed).normal(0, scale, 4000).astype(np.float32)


def cost(act: str, u: np.ndarray, m: np.ndarray, p: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The objective of an entry, in float64."""
    u, c = u.astype(np.float64), PENALTIES
    activated = reference.ACTIVATIONS["silu" if act == "swish" else act](u)
    return c.alpha * (u - m) ** 2 + c.gamma * (p - factor * activated) ** 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("act", SMOOTH)
def test_a_step_behind_a_gate_never_raises_its_objective(act: str, scale: float) -> None:
    """However large z is; the official step of fixed rate diverges. Most entries get better."""
    m, s, p = normal(0), normal(1, 3), normal(2, scale)
    z = np.random.default_rng(3).uniform(-scale, scale, 4000).astype(np.float32)
    arrays = (jnp.asarray(x) for x in (m, s, p))
    new = np.asarray(core.activated_step(*arrays, act, PENALTIES, jnp.asarray(z)))
    before, after = cost(act, s, m, p, z), cost(act, new, m, p, z)
    assert np.all(after <= before * (1 + 1e-4) + 1e-6 * np.maximum(1, scale**2 * 1e-6))
    assert np.mean(after < before) > 0.6
    assert np.mean(after) < 0.8 * np.mean(before)


@pytest.mark.parametrize("act", SMOOTH)
def test_a_step_without_a_gate_never_raises_its_objective(act: str) -> None:
    """It starts at the output of W1, as the alternation does, and is half way at the least."""
    m, p, one = normal(0, 2), normal(1, 2), np.ones(4000)
    arrays = (jnp.asarray(x) for x in (m, m, p))
    new = np.asarray(core.activated_step(*arrays, act, PENALTIES))
    before, after = cost(act, m, m, p, one), cost(act, new, m, p, one)
    assert np.all(after <= before * (1 + 1e-5) + 1e-6)
    grid = np.linspace(-12, 12, 4001)[:, None]
    least = np.min(cost(act, grid, m[None, :400], p[None, :400], one[None, :400]), axis=0)
    left = np.sum(after[:400] - least) / np.sum(before[:400] - least)
    assert left < 0.5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu"])
def test_a_step_of_a_smooth_activation_is_gauss_newtons(act: str, gated: bool) -> None:
    """Against float64 with the derivative written out."""
    m, u, p = normal(0), normal(1, 2), normal(2, 2)
    z = normal(3, 2) if gated else None
    arrays = (jnp.asarray(x) for x in (m, u, p))
    got = core.activated_step(*arrays, act, PENALTIES, 1.0 if z is None else jnp.asarray(z))
    c = reference.Settings(act, 0.5, *PENALTIES, 0.01, 1.0, 1)
    m64, u64, p64 = (x.astype(np.float64) for x in (m, u, p))
    want = reference.activated(c, m64, u64, p64, 1.0 if z is None else z.astype(np.float64))
    off = np.abs(np.asarray(got) - want) > 1e-3
    # Where a step neither raises nor lowers the objective, rounding decides whether it is taken.
    assert np.mean(off) < 2e-3
    assert np.mean(want != u64) > 0.5


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_relu_behind_a_gate_takes_the_minimum_over_a_grid(scale: float) -> None:
    """Of gamma (p - relu(s) z)^2 + alpha (s - m)^2, everywhere."""
    m, p, z = (normal(i, k)[:200] for i, k in enumerate((2, scale, scale)))
    arrays = (jnp.asarray(x) for x in (m, m, p))
    got = np.asarray(core.activated_step(*arrays, "relu", PENALTIES, jnp.asarray(z)))
    grid = np.linspace(-12, 12, 24001)[:, None]
    least = np.min(cost("relu", grid, m[None], p[None], z[None]), axis=0)
    found = cost("relu", got, m, p, z)
    assert np.all(found <= least + 1e-5 * np.maximum(1, scale**2))
    assert np.any(got > 0) and np.any(got < 0)
