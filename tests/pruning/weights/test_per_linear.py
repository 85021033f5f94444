"""`PerLinear` against a plain loop over blocks in NumPy, with budgets of blocks and rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration import passes
from calibration.observers import second_moment
from calibration.runtime import Runtime
from models.arch import Model, embed
from pruning.types import (
    Allocation,
    Budget,
    Layerwise,
    Mask,
    Outcome,
    Pattern,
    Pruner,
    Request,
    prune,
)
from pruning.weights import scores
from pruning.weights.patterns import n_of_m, per_matrix, per_row
from pruning.weights.per_linear import PerLinear
from pruning.weights.score_solver import score_solver
from reference import wanda as reference
from reference.small import (
    FAMILIES,
    model,
    removed_by_wanda,
    run_block,
    same,
    tokens,
    weight,
    without,
    zeros,
)


def wanda(pattern: Pattern) -> Pruner:
    """Wanda's pruner, as its method makes it."""
    return Pruner(second_moment, score_solver(scores.wanda, pattern.keep))


def in_numpy(
    m: Model, budget: Budget, pattern: tuple[int, int] | None
) -> list[dict[str, np.ndarray]]:
    """Wanda's masks by the book: a block's dense activations decide, its pruned output goes on."""
    x, found = embed(m.arch, m.non_block, tokens()), []
    for block, fractions in zip(m.blocks, budget, strict=True):
        _, taps = run_block(m, block, x)
        found.append(removed_by_wanda(m, block, taps, fractions, pattern))
        x, _ = run_block(m, without(block, found[-1]), x)
    return found


def uneven(m: Model) -> Budget:
    """Another fraction for every linear, and in the second block for every row."""
    fractions: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for k, slot in enumerate(m.arch.slots):
        rows = getattr(m.blocks[1], slot.name).w.shape[0]
        fractions[0][slot.name] = np.float64(0.1 * k)
        fractions[1][slot.name] = np.linspace(0, 0.9, rows)
        fractions[2][slot.name] = np.float64(0.6 - 0.1 * k) if k < 6 else np.float64(0.3)
    return tuple(fractions)


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, kind) for family in FAMILIES for kind in ("uniform", "uneven")), ("llama", "3:8")],
)
def test_masks_are_those_of_the_loop(family: str, kind: str) -> None:
    m = model(family)
    budget = (
        uneven(m)
        if kind == "uneven"
        else tuple({s.name: np.float64(0.5) for s in m.arch.slots} for _ in m.blocks)
    )
    pattern = (3, 8) if kind == "3:8" else None
    request = Request(
        0.5,
        pattern,
        allocation=(lambda *_: Allocation(budget)) if kind == "uneven" else None,
    )
    pruned, outcome = prune(m, PerLinear(wanda, per_row), tokens(), request, Runtime(batch=6))
    for got, want in zip(zeros(pruned), in_numpy(m, budget, pattern), strict=True):
        for slot, mask in want.items():
            assert np.array_equal(got[slot], mask), slot
    want_asked = [
        {slot: pytest.approx(np.mean(f)) for slot, f in fractions.items()} for fractions in budget
    ]
    assert list(outcome.asked) == want_asked
    assert outcome.removed == ()


def test_what_stays_is_untouched() -> None:
    """Kept weights, biases and norms to the bit; only the linears of the slots are others."""
    m = model("opt")
    pruned, _ = prune(m, PerLinear(wanda, per_row), tokens(), Request(0.5))
    assert pruned.non_block is m.non_block
    for new, old, gone in zip(pruned.blocks, m.blocks, zeros(pruned), strict=True):
        assert same((new.attn_norm, new.mlp_norm), (old.attn_norm, old.mlp_norm))
        for slot, zero in gone.items():
            assert np.array_equal(getattr(new, slot).w, np.where(zero, 0, getattr(old, slot).w))
            assert same(getattr(new, slot).b, getattr(old, slot).b)


def test_a_block_of_which_nothing_is_asked_is_the_same_object() -> None:
    """Even with n:m, which otherwise removes its n whatever the fraction."""
    m = model("llama")
    budget = tuple({s.name: np.float64(0.5 * (i != 1)) for s in m.arch.slots} for i in range(3))
    for pattern in (None, (3, 8)):
        pruned, _ = prune(
            m,
            PerLinear(wanda, per_row),
            tokens(),
            Request(0.5, pattern, allocation=lambda *_: Allocation(budget)),
        )
        assert pruned.blocks[1] is m.blocks[1]
        assert pruned.blocks[0] is not m.blocks[0] and pruned.blocks[2] is not m.blocks[2]


def test_the_allocation_knows_the_model_the_sparsity_and_the_method() -> None:
    asked: list[tuple[Model, float, Layerwise]] = []

    def allocation(
        m: Model, tokens: np.ndarray, request: Request, runtime: Runtime, layerwise: Layerwise
    ) -> Allocation:
        asked.append((m, request.sparsity, layerwise))
        return Allocation(uneven(m), {"found": 1}, ("mind",))

    _, outcome = prune(
        model("llama"), PerLinear(wanda, per_row), tokens(), Request(0.37, allocation=allocation)
    )
    ((m, sparsity, layerwise),) = asked
    assert m is model("llama") and sparsity == 0.37
    assert layerwise == Layerwise(wanda(per_row), per_row), "what it may try budgets with"
    assert outcome.details == {"found": 1} and outcome.warnings == ("mind",)


def test_without_an_observer_no_token_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither embedded nor run through the blocks."""
    monkeypatch.setattr(passes, "embed", None)

    def blind(pattern: Pattern) -> Pruner:
        return Pruner(None, score_solver(scores.magnitude, pattern.keep))

    pruned, _ = prune(model("llama"), PerLinear(blind, per_matrix), tokens(), Request(0.5))
    assert all(zero.any() for gone in zeros(pruned) for zero in gone.values())


def returned_input(
    ws: Sequence[jax.Array], stats: Any, counts: Sequence[jax.Array]
) -> list[tuple[jax.Array, Mask]]:
    """A solver that writes what it was given: the statistics of its input, and the count."""
    told = [
        jnp.broadcast_to(stats.per_sample[None, :] + 1000.0 * jnp.float32(n), w.shape)
        for w, n in zip(ws, counts, strict=True)
    ]
    return [(x, jnp.ones(x.shape, bool)) for x in told]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_linear_gets_the_statistics_of_its_own_input(family: str) -> None:
    m = model(family)
    method = PerLinear(lambda pattern: Pruner(second_moment, returned_input), per_row)
    pruned, _ = prune(m, method, tokens(), Request(0.5))
    _, taps = run_block(m, m.blocks[0], embed(m.arch, m.non_block, tokens()))
    for slot in m.arch.slots:
        want = reference.scaler_row(taps[slot.reads]) + 1000.0 * (
            len(reference.scaler_row(taps[slot.reads])) // 2
        )
        np.testing.assert_allclose(
            weight(pruned.blocks[0], slot.name)[0], want, rtol=1e-5, err_msg=slot.name
        )


def test_equal_parts_make_one_solver() -> None:
    """Solvers are static arguments of jit: a fresh one would compile again."""
    assert score_solver(scores.wanda, n_of_m(2, 4).keep) is score_solver(
        scores.wanda, n_of_m(2, 4).keep
    )
    assert score_solver(scores.wanda, per_row.keep) is not score_solver(
        scores.magnitude, per_row.keep
    )


def test_a_solver_gives_its_mask() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    ((new, kept),) = score_solver(scores.magnitude, per_row.keep)([w], None, [jnp.int32(3)])
    assert kept.dtype == bool and np.array_equal(kept.sum(axis=1), [5] * 4)
    assert np.array_equal(new, np.where(kept, w, 0))


def test_the_outcome_covers_every_slot() -> None:
    m = model("llama-gqa")
    outcome: Outcome = prune(m, PerLinear(wanda, per_row), tokens(), Request(0.25))[1]
    want: Mapping[str, float] = {s.name: 0.25 for s in m.arch.slots}
    assert list(outcome.asked) == [want] * 3
