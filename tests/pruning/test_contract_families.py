"""The contract of every method on the families whose blocks differ, mixtures of experts too."""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from pruning.budget import all_shapes
from pruning.methods import ALLOCATIONS, METHODS
from pruning.types import Request, prune
from pruning.weights.dsnot import DSnoT
from reference.contract import (
    BLOCKS,
    WEIGHTS,
    Case,
    covered,
    first_case_of_other_families,
    run,
)
from reference.small import logits, model, same, tokens, zeros

MAPS = pathlib.Path("/proc/self/maps")  # Linux lists a process's memory maps here, one a line


@pytest.fixture(autouse=True)
def forget_many_compilations() -> Iterator[None]:
    """Drop compiled programs when they are many: a process has room for 65,530 memory maps.

    Six thousand are some thirty tests, two families or three, which share what they can.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 6000:
        jax.clear_caches()


@pytest.mark.slow
@first_case_of_other_families
def test_every_method_prunes_every_family(case: Case, family: str) -> None:
    """Every linear is covered, what goes is near what was asked, and all else is untouched."""
    m, (pruned, outcome) = model(family), run(case, family)
    result = logits(pruned, tokens())
    assert np.isfinite(result).all()
    assert not np.allclose(result, logits(m, tokens()), rtol=1e-2, atol=1e-2)
    shapes = all_shapes(m)
    assert all(set(asked) <= set(slots) for asked, slots in zip(outcome.asked, shapes, strict=True))
    if case in WEIGHTS:
        assert len(covered(pruned, outcome)) == sum(map(len, shapes))
        shares = [zero.mean() for gone in zeros(pruned) for zero in gone.values()]
        assert np.allclose(shares, 0.5, atol=0.05)
    elif case in BLOCKS:
        assert len(pruned.blocks) == 1
    else:
        before, after = (
            sum(out * into for block in all_shapes(x) for out, into in block.values())
            for x in (m, pruned)
        )
        assert 0.3 < after / before < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", [n for n in ALLOCATIONS if n != "uniform"])
def test_every_allocation_meets_the_sparsity_of_a_mixture_of_experts(
    name: str, family: str
) -> None:
    m = model(family)
    request = Request(0.5, allocation=ALLOCATIONS[name]())
    pruned, outcome = prune(m, METHODS["wanda"](), tokens(), request)
    assert np.isfinite(logits(pruned, tokens())).all()
    gone, sizes = (
        sum(f(zero) for block in zeros(pruned) for zero in block.values())
        for f in (np.sum, np.size)
    )
    assert abs(gone / sizes - 0.5) < 0.01
    assert [set(asked) for asked in outcome.asked] == [set(slots) for slots in all_shapes(m)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_masks_of_experts_are_refined_and_follow_a_pattern(family: str) -> None:
    m = model(family)
    refined, _ = prune(m, METHODS["wanda"](), tokens(), Request(0.5, refine=DSnoT()))
    plain, _ = prune(m, METHODS["wanda"](), tokens(), Request(0.5))
    assert not same(refined.blocks, plain.blocks)
    for name in ("wanda", "sparsegpt"):
        pruned, _ = prune(m, METHODS[name](), tokens(), Request(0.5, pattern=(2, 4)))
        for block in zeros(pruned):
            for zero in block.values():
                assert (zero.reshape(len(zero), -1, 4).sum(axis=2) == 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "sparsellm", "admm"])
def test_experts_that_saw_few_tokens_are_listed(name: str) -> None:
    _, outcome = prune(model("olmoe"), METHODS[name](), tokens(samples=2), Request(0.5))
    assert any("experts were pruned by magnitude" in w for w in outcome.warnings)
    few = outcome.details["tokens_of_experts_by_magnitude"]
    assert few[0] and all(0 <= n < 32 for taps in few for n in taps.values())
