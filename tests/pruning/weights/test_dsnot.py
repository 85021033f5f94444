"""DSnoT: swaps against sorted lists in NumPy, statistics, and every family and method."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from calibration.moments import moments
from models.arch import embed
from models.errors import InputError
from pruning.methods import METHODS, REFINEMENTS
from pruning.types import Request, prune
from pruning.weights.dsnot_core import Settings, swap
from reference import allocation as reference
from reference.small import FAMILIES, logits, model, run_block, same, tokens, weight, zeros

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("cycles", [1, 3, 12])
@pytest.mark.parametrize("official", [True, False])
def test_swaps_are_those_of_the_sorted_lists(cycles: int, official: bool) -> None:
    """Few cycles, so that the lists do not run out: the official code then goes on at the end."""
    c = RNG.normal(size=(20, 64)) * RNG.choice([0.3, 3.0], (20, 64))
    metric, variance = RNG.random((20, 64)), RNG.random(64) + 0.1
    kept = metric >= np.sort(metric, axis=1)[:, [32]]
    want = np.stack(
        [
            reference.swaps(*row, variance, k, cycles, official)
            for *row, k in zip(c, metric, kept, strict=True)
        ]
    )
    e = np.where(kept, 0, c).sum(axis=1)
    f = [jnp.asarray(x, jnp.float32) for x in (c, e, metric, variance)]
    got = np.asarray(swap(*f, jnp.asarray(kept), Settings(cycles, official)))
    assert np.array_equal(got, want)
    assert not np.array_equal(got, kept)
    assert np.array_equal(got.sum(axis=1), kept.sum(axis=1))


def test_every_swap_of_the_corrected_variant_brings_the_row_nearer() -> None:
    c, metric = RNG.normal(size=(30, 40)), RNG.random((30, 40))
    kept = metric >= np.sort(metric, axis=1)[:, [28]]
    arrays = [
        jnp.asarray(x, jnp.float32)
        for x in (c, np.where(kept, 0, c).sum(axis=1), metric, np.ones(40))
    ]
    lacks = []
    for cycles in (1, 2, 4, 8, 50):
        got = np.asarray(swap(*arrays, jnp.asarray(kept), Settings(cycles, False)))
        lacks.append(np.abs(np.where(got, 0, c).sum(axis=1)))
    assert all((after <= before + 1e-5).all() for before, after in itertools.pairwise(lacks))
    assert lacks[-1].mean() < 0.2 * np.abs(arrays[1]).mean()


def test_inputs_that_never_vary_do_not_break_it() -> None:
    c, kept = jnp.ones((2, 6)), jnp.asarray([[True] * 3 + [False] * 3] * 2)
    got = swap(c, jnp.full(2, 3.0), jnp.ones((2, 6)), jnp.zeros(6), kept, Settings(5, False))
    assert np.array_equal(got, kept)


def test_moments_agree_with_numpy() -> None:
    x = RNG.normal(size=(6, 9, 4)).astype(np.float32) + np.array([0, 3, -1, 10], np.float32)
    state = moments.init(4)
    for part in np.split(x, [1, 4]):
        state = moments.update(state, jnp.asarray(part))
    y = x.astype(np.float64)
    np.testing.assert_allclose(state.mean, y.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(state.window_sum, y.sum(1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.variance_within, y.var(1).mean(0), rtol=1e-4)
    np.testing.assert_allclose(state.variance, y.var((0, 1)), rtol=1e-3)
    np.testing.assert_allclose(state.second.per_sample, (y**2).sum(1).mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
@pytest.mark.parametrize("variant", [pytest.param("official", marks=pytest.mark.slow), "corrected"])
@pytest.mark.parametrize(
    "method",
    ["magnitude", "sparsegpt"]
    + [pytest.param(m, marks=pytest.mark.slow) for m in ("wanda", "multiflow")],
)
def test_a_refined_mask_removes_as_much(method: str, variant: Any, family: str) -> None:
    m = model(family)
    refined, outcome = prune(
        m, METHODS[method](), tokens(), Request(0.5, refine=REFINEMENTS["dsnot"](variant=variant))
    )
    plain, _ = prune(m, METHODS[method](), tokens(), Request(0.5))
    assert np.isfinite(logits(refined, tokens())).all()
    assert not same(refined.blocks, plain.blocks)
    for a, b in zip(zeros(refined), zeros(plain), strict=True):
        for slot in a:
            assert (
                np.array_equal(a[slot].sum(axis=1), b[slot].sum(axis=1)) or method == "sparsegpt"
            ), slot
            assert (
                abs(int(a[slot].sum()) - int(b[slot].sum()))
                <= (method == "sparsegpt") * a[slot].size * 0.05
            )
    assert [set(asked) for asked in outcome.asked] == [{s.name for s in m.arch.slots}] * 3


def test_the_official_variant_leaves_the_feed_forward_part_alone() -> None:
    m = model("llama")
    plain, _ = prune(m, METHODS["wanda"](), tokens(), Request(0.5))
    first, every = (
        prune(
            m, METHODS["wanda"](), tokens(), Request(0.5, refine=REFINEMENTS["dsnot"](variant=v))
        )[0].blocks[0]
        for v in ("official", "corrected")
    )
    assert same(first.down, plain.blocks[0].down) and same(first.up, plain.blocks[0].up)
    assert not same(first.q, plain.blocks[0].q)
    assert not same(every.down, plain.blocks[0].down)


def test_expected_outputs_come_nearer() -> None:
    """The mean outputs of the first block's linears lack less on the calibration tokens."""
    m = model("opt")
    _, taps = run_block(m, m.blocks[0], embed(m.arch, m.non_block, tokens()))

    def lack(refine: Any) -> float:
        block = prune(m, METHODS["wanda"](), tokens(), Request(0.5, refine=refine))[0].blocks[0]
        changes = (
            (weight(m.blocks[0], s.name) - weight(block, s.name), taps[s.reads].mean((0, 1)))
            for s in m.arch.slots
        )
        return sum(float(np.abs(w @ x).sum()) for w, x in changes)

    assert lack(REFINEMENTS["dsnot"]()) < 0.5 * lack(None)


def test_a_pattern_or_a_joint_method_cannot_be_refined() -> None:
    refine = REFINEMENTS["dsnot"]()
    with pytest.raises(InputError, match="an N:M pattern does not allow"):
        prune(model("llama"), METHODS["wanda"](), tokens(), Request(0.5, (4, 8), refine=refine))
    for method in ("llmrank", "sparsellm"):
        with pytest.raises(InputError, match=f"{method} does not"):
            prune(model("llama"), METHODS[method](), tokens(), Request(0.5, refine=refine))
    with pytest.raises(InputError, match="cycles=0"):
        REFINEMENTS["dsnot"](cycles=0)
