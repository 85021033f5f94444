"""The contract of every method on every family; a method in METHODS is held to it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibration.runtime import Runtime
from launch.run.compilation import counted
from models.arch import Model
from models.errors import InputError
from pruning.methods import METHODS
from pruning.structured.llmrank_importance import _flow
from pruning.types import Outcome, Request, prune, reads_activations
from reference import tiny
from reference.contract import (
    ALIKE,
    BLOCKS,
    CASES,
    EVERYWHERE,
    LLMRANK,
    UNITS,
    WEIGHTS,
    Case,
    covered,
    every_case,
    every_family,
    fresh,
    quick,
    run,
)
from reference.small import logits, model, same, tokens, weight, zeros


@every_family
@every_case
def test_the_pruned_model_runs_and_is_another(case: Case, family: str) -> None:
    pruned = logits(run(case, family)[0], tokens())
    assert np.isfinite(pruned).all()
    assert not np.allclose(pruned, logits(model(family), tokens()), rtol=1e-2, atol=1e-2)


@every_family
@pytest.mark.parametrize("case", quick(WEIGHTS), ids=str)
def test_weights_are_removed_as_asked(case: Case, family: str) -> None:
    """Every linear is covered and misses its budget by at most one entry a row (or a matrix)."""
    pruned, outcome = run(case, family)
    assert len(covered(pruned, outcome)) == 3 * len(pruned.arch.slots)
    for asked, gone in zip(outcome.asked, zeros(pruned), strict=True):
        for slot, zero in gone.items():
            by_matrix = case in (Case("magnitude"), Case("sparsegpt")) or case.name == "sparsellm"
            by_matrix |= case == Case("ria")
            by_matrix |= case in (
                Case("admm", (("scope", "matrix"),)),
                Case("admm", (("variant", "official"),)),
            )
            target, removed = (
                (asked[slot] * n for n in (zero.size, zero.shape[1])),
                (zero.sum(), zero.sum(axis=1)),
            )
            matrix, row = (np.abs(r - t).max() for r, t in zip(removed, target, strict=True))
            assert matrix <= 1 if by_matrix else row <= 1


def shares(case: Case, m: Model, outcome: Outcome) -> dict[str, np.ndarray]:
    """Return the removed rows of each linear, or the removed columns of the reader of neurons."""
    rows = dict(case.arguments).get("units") == "rows"
    reader = m.arch.group("neurons").reader.name
    slots = outcome.removed[0] if rows else [reader]
    return {
        s: np.array([len(gone[s].rows if rows else gone[s].columns) for gone in outcome.removed])
        for s in slots
    }


@every_family
@pytest.mark.parametrize("case", quick(ALIKE), ids=str)
def test_units_are_removed_as_asked(case: Case, family: str) -> None:
    """Of every list that is selected from on its own, half the units, to the nearest one."""
    m, (pruned, outcome) = model(family), run(case, family)
    sizes = {s.name: getattr(m.blocks[0], s.name).w.shape[0] for s in m.arch.slots} | {
        m.arch.group("neurons").reader.name: 24
    }
    if dict(case.arguments).get("units") == "rows":
        sizes |= {m.arch.group("neurons").reader.name: 16}
    removed = shares(case, m, outcome)
    if dict(case.arguments).get("scope") == "global":
        assert (
            abs(sum(r.sum() for r in removed.values()) - 0.5 * 3 * sum(sizes[s] for s in removed))
            <= 1
        )
    else:
        assert all((np.abs(r - 0.5 * sizes[s]) <= 0.5).all() for s, r in removed.items())
    for i, slot in covered(pruned, outcome):
        gone, w = outcome.removed[i][slot], weight(pruned.blocks[i], slot)
        before = weight(m.blocks[i], slot)
        if gone.cut:
            assert w.shape == (
                before.shape[0] - len(gone.rows),
                before.shape[1] - len(gone.columns),
            )
        else:
            assert np.array_equal(np.flatnonzero((w == 0).all(axis=1)), gone.rows)


def repaired(case: Case) -> bool:
    """Return whether blocks that stay make up for those removed."""
    arguments = dict(case.arguments)
    return arguments.get("repair") != "none" and arguments.get("variant") != "official"


@every_family
@pytest.mark.parametrize("case", quick(BLOCKS), ids=str)
def test_blocks_are_removed_as_asked(case: Case, family: str) -> None:
    """Half of three blocks are two, half of six sublayers three; removed linears count whole."""
    m, (pruned, outcome) = model(family), run(case, family)
    sublayers = dict(case.arguments).get("units") == "sublayers"
    assert len(outcome.asked) == 3 and all(
        asked == dict.fromkeys((s.name for s in m.arch.slots), 0.5) for asked in outcome.asked
    )
    assert len(outcome.details["removal_order"]) == (3 if sublayers else 2) and len(
        pruned.blocks
    ) == len(outcome.kept_blocks)
    for i, block in zip(outcome.kept_blocks, pruned.blocks, strict=True):
        assert sublayers or repaired(case) or same(block, m.blocks[i])
    assert sublayers or len(pruned.blocks) == 1


@every_family
@every_case
def test_sparsity_zero_changes_no_bit(case: Case, family: str) -> None:
    assert same(fresh(case, model(family), 0.0)[0].blocks, model(family).blocks)


@pytest.mark.parametrize(
    "case",
    quick([next(c for c in CASES if c.name == name) for name in EVERYWHERE], ("wanda", "flap")),
    ids=str,
)
def test_bfloat16_stays_bfloat16(case: Case) -> None:
    m = model("llama", dtype="bfloat16")
    assert same(fresh(case, m, 0.0)[0].blocks, m.blocks)
    half = fresh(case, m, 0.5)[0].blocks
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert not same(half, m.blocks)


@every_family
@every_case
def test_the_same_seed_gives_the_same_bits_and_the_model_is_left_alone(
    case: Case, family: str
) -> None:
    m = model(family)
    before = jax.tree.map(np.array, (m.non_block, m.blocks))
    assert same(fresh(case, m, 0.5)[0].blocks, run(case, family)[0].blocks)
    assert same(jax.tree.map(np.array, (m.non_block, m.blocks)), before)


@every_case
def test_another_seed_matters_to_what_is_random_alone(case: Case) -> None:
    again, _ = fresh(case, model("llama"), 0.5, seed=1)
    assert same(again.blocks, run(case, "llama")[0].blocks) == (
        dict(case.arguments).get("scorer") != "random"
    )


@every_family
@pytest.mark.parametrize("case", quick(WEIGHTS), ids=str)
def test_the_budget_is_data(case: Case, family: str) -> None:
    """Another sparsity, or another model of the same architecture, compiles nothing."""
    run(case, family)
    other = model(family, seed=2)
    with counted() as compilation:
        for sparsity in (0.0, 0.31, 0.75, 0.9):
            fresh(case, model(family), sparsity)
        fresh(case, other, 0.4)
    assert compilation.programs == 0


@every_family
@pytest.mark.parametrize("case", quick(LLMRANK), ids=str)
def test_units_compile_only_for_their_new_widths(case: Case, family: str) -> None:
    """Importance and zeroing compile once; cutting, once for each shape and new width."""
    run(case, family)
    other = model(family, seed=2)
    with counted() as compilation:
        fresh(case, other, 0.5, seed=3)
        assert compilation.programs == 0
        scans = _flow.jitted._cache_size()
        for sparsity in (0.25, 0.75):
            fresh(case, other, sparsity)
    assert _flow.jitted._cache_size() == scans
    assert compilation.programs <= (0 if dict(case.arguments).get("units") == "rows" else 2 * 3)


@every_family
@pytest.mark.parametrize("case", quick(WEIGHTS, ("wanda", "sparsegpt")), ids=str)
def test_patterns_zero_exactly_n_of_every_m(case: Case, family: str) -> None:
    """All weights are different, so zeros are what was removed."""
    pruned, _ = fresh(case, model(family), 3 / 8, pattern=(3, 8))
    for gone in zeros(pruned):
        assert all(
            (zero.reshape(len(zero), -1, 8).sum(axis=2) == 3).all() for zero in gone.values()
        )


@every_family
@pytest.mark.parametrize("case", quick(WEIGHTS), ids=str)
def test_patterns_that_do_not_divide_are_bad_input(case: Case, family: str) -> None:
    with pytest.raises(
        InputError, match=r"pattern=2:5 does not fit: 16 inputs of a linear are not a multiple of 5"
    ):
        fresh(case, model(family), 0.4, pattern=(2, 5))


@pytest.mark.parametrize("case", quick(UNITS), ids=str)
def test_patterns_of_units_are_bad_input(case: Case) -> None:
    with pytest.raises(InputError, match="pattern=2:4 is for weight methods"):
        fresh(case, model("llama"), 0.5, pattern=(2, 4))


@every_case
def test_other_windows_change_what_reads_activations_alone(case: Case) -> None:
    m, request = model("llama"), Request(0.5)
    method = METHODS[case.name](**dict(case.arguments))
    other, again = prune(m, method, tokens(seed=7), request)
    pruned, outcome = run(case, "llama")
    equal = (
        same(again.scores, outcome.scores)
        and again.details == outcome.details
        and same(other.blocks, pruned.blocks)
    )
    assert equal == (not reads_activations(method, request))


@every_case
def test_every_stage_takes_the_steps_it_announces(case: Case) -> None:
    """One for each block, in every walk over the blocks; in searches one for each trial."""
    told: dict[str, list[int]] = {}

    def progress(what: str, steps: int, **_: Any) -> Callable[[], None]:
        told[what] = [steps, 0]

        def advance() -> None:
            told[what][1] += 1

        return advance

    fresh(case, model("llama"), 0.5, Runtime(progress=progress))
    searches = case in BLOCKS or case.name == "two_ssp"
    assert told and all(n == taken and (n == 3 or searches) for n, taken in told.values()), told


@every_case
def test_every_block_goes_to_the_sink_once_and_in_order(case: Case) -> None:
    sink: list[int] = []
    METHODS[case.name](**dict(case.arguments)).run(
        model("llama"), tokens(), Request(0.5), Runtime(), lambda i, block: sink.append(i)
    )
    assert sink == list(range(len(run(case, "llama")[0].blocks)))
    assert len(sink) == 3 or case in BLOCKS


@every_case
def test_the_report_of_the_outcome_is_json(case: Case) -> None:
    """Figures are Python numbers and scores NumPy arrays; nothing keeps device memory alive."""
    _, outcome = run(case, "llama")
    assert all(type(f) is float for asked in outcome.asked for f in asked.values())
    assert all(
        type(i) is int
        for gone in outcome.removed
        for r in gone.values()
        for i in (*r.rows, *r.columns)
    )
    assert all(isinstance(s, np.ndarray) for scores in outcome.scores for s in scores.values())
    assert bool(outcome.scores) == bool(outcome.scores_label)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [next(c for c in CASES if c.name == name) for name in EVERYWHERE], ids=str
)
def test_heads_need_not_make_up_the_hidden_size(case: Case) -> None:
    """Queries are wider than the residual stream, and many enough for one list with the neurons."""
    m = tiny.random_model({**tiny.LLAMA, "num_attention_heads": 8, "head_dim": 10})
    method = METHODS[case.name](**dict(case.arguments))
    pruned, outcome = prune(m, method, tiny.tokens(), Request(0.5))
    assert m.blocks[0].q.w.shape == (80, 32)
    assert np.isfinite(logits(pruned, tiny.tokens())).all()
    assert not same(pruned.blocks, m.blocks)
    if "kept_heads" in outcome.details:
        assert [len(b.q.w) for b in pruned.blocks] == [
            10 * max(1, len(kept)) for kept in outcome.details["kept_heads"]
        ]
