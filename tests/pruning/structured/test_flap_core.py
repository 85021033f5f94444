"""FLAP's statistics and metrics against NumPy, and its selections by what they count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.moments import moments
from pruning.structured.flap_core import (
    Units,
    input_feature_metrics,
    official_fluctuation,
    select_corrected,
    select_official,
)
from reference import flap as reference

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(7, 5, 6)) * [1, 2, 0.1, 3, 1, 0] + [0, 5, 1, -2, 0, 3]).astype(np.float32)
W = RNG.normal(size=(4, 6)).astype(np.float32)
STRUCTURES = ["UL-UM", "UL-MM", "AL-MM", "AL-AM"]


def observed(observer: Any, sizes: tuple[int, ...]) -> Any:
    """Return the state of an observer after X in micro-batches of these sizes."""
    state = observer.init(6)
    for part in np.split(X, np.cumsum(sizes)[:-1]):
        state = jax.jit(observer.update)(state, jnp.asarray(part))
    return state


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 4)])
def test_official_statistics_equal_the_loop_over_samples_in_any_batches(
    sizes: tuple[int, ...],
) -> None:
    state = observed(official_fluctuation, sizes)
    mean, fluctuation = reference.official(X)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.fluctuation, fluctuation, rtol=1e-4, atol=1e-6)


def test_metrics_equal_their_formulas() -> None:
    metrics = input_feature_metrics(jnp.asarray(W), observed(moments, (7,)))
    variance = X.astype(np.float64).var((0, 1))
    norm = np.sqrt((X.astype(np.float64) ** 2).sum(1).mean(0))
    np.testing.assert_allclose(metrics["IFV"], variance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["WIFV"], variance * (W**2).sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["WIFN"], (np.abs(W) * norm).mean(0), rtol=1e-5)


def units() -> tuple[Units, Units]:
    """Return the heads and neurons of three blocks: four heads of 2 channels, and ten neurons.

    A head holds as many parameters as eight neurons.
    """
    rng = np.random.default_rng(1)
    heads = Units([rng.random(8) for _ in range(3)], 2, [24.0] * 3)
    neurons = Units([rng.random(10) for _ in range(3)], 1, [3.0] * 3)
    return heads, neurons


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_corrected_selection_removes_the_share_of_parameters(structure: Any, ratio: float) -> None:
    """To half a head, or half a neuron where neurons make up for the heads.

    Of each kind one unit stays in every block.
    """
    heads, neurons = units()
    kept = select_corrected(heads, neurons, ratio, structure, 3)
    removed = sum(
        (~k).sum() * u.costs[0] for u, ks in zip((heads, neurons), kept, strict=True) for k in ks
    )
    total = 3 * (4 * 24 + 10 * 3)
    most = 3 * 24 + 27 * 3 if structure.endswith("MM") else total
    near = {"UL-UM": 3 * 12 + 3 * 1.5, "UL-MM": 4.5, "AL-MM": 1.5, "AL-AM": 12}[structure]
    assert abs(removed - min(ratio * total, most)) <= near
    assert all(k.any() for ks in kept for k in ks)


def test_official_selection_equals_the_one_by_hand() -> None:
    """One block with heads 1 and 4 (squared) and neurons 1, 2, 3.

    A head is worth 2.67 neurons, truncated to 2.
    """
    heads, neurons = (
        Units([np.array([1.0, 2.0])], 1, [8.0]),
        Units([np.array([3.0, 1.0, 2.0])], 1, [3.0]),
    )
    assert [k.tolist() for k in select_official(heads, neurons, 0.5, "UL-UM", 0).heads] == [
        [False, True]
    ]
    assert [k.tolist() for k in select_official(heads, neurons, 0.4, "UL-UM", 0).neurons] == [
        [True, False, True]
    ]
    # Of 25 parameters 0.5 are 12.5; one head is 8, which leaves 4.5 for one neuron of 3.
    for structure in ("UL-MM", "AL-MM"):
        kept = select_official(heads, neurons, 0.5, structure, 1)
        assert kept.heads[0].tolist() == [False, True] and kept.neurons[0].tolist() == [
            True,
            False,
            True,
        ]
    # Standardised: heads -0.7, 0.7; neurons 1, -1, 0. From the highest down they are worth 1, 3, 4,
    # 6, 7 of 7. At 0.5 the target 3.5 is as near to 3 as to 4: the first of both, the head 0.7, is
    # the threshold and does not stay.
    kept = select_official(heads, neurons, 0.5, "AL-AM", 0)
    assert kept.heads[0].tolist() == [False, False] and kept.neurons[0].tolist() == [
        True,
        False,
        False,
    ]
