"""A second round on a model whose blocks differ in width counts the units of each block."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Block, Model
from models.checkpoint import widths as widths_module
from models.programs import Recorder, record_programs
from pruning.figures import KeptMap
from pruning.methods import ALLOCATIONS, METHODS
from pruning.structured import remove
from pruning.types import Outcome, Request, prune
from reference.sleb import deep
from reference.small import RAGGED, logits, model, same, tokens, zeros

# Of every method that cuts units: each way to choose them, and each repair.
UNITS: list[tuple[str, dict[str, Any]]] = [
    ("llmrank", {}),
    ("llmrank", {"variant": "official"}),
    ("llmrank", {"scorer": "mpr", "scope": "global", "repair": "refit"}),
    ("llmrank", {"scorer": "norm", "chain": False, "repair": "bias", "round_to": 4}),
    ("flap", {}),
    ("flap", {"variant": "official"}),
    ("flap", {"structure": "UL-UM", "bias": False}),
    ("flap", {"structure": "UL-MM", "heads_removed": 3}),
    ("flap", {"structure": "UL-MM", "heads_removed": 3, "variant": "official"}),
    ("flap", {"structure": "AL-MM", "heads_removed": 3, "spread": 0.2, "refit": True}),
    ("flap", {"structure": "AL-MM", "heads_removed": 2, "variant": "official"}),
    ("flap", {"structure": "AL-AM", "bias": False}),
    ("wanda_sp", {}),
    ("wanda_sp", {"scope": "global", "repair": "bias"}),
    ("magnitude_sp", {"repair": "refit"}),
    ("magnitude_sp", {"scope": "global"}),
]
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("llmrank", {"units": "rows"}),
    ("llmrank", {"units": "rows", "scope": "global", "variant": "official"}),
    ("llmrank", {"units": "rows", "scope": "global"}),
]
WEIGHTS = ["wanda", "sparsegpt"]


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return " ".join([case[0], *(str(v) for v in case[1].values())])


def again(
    m: Model, method: str, arguments: Mapping[str, Any], sparsity: float = 0.3, **request: Any
) -> tuple[Model, Outcome]:
    built = METHODS[method](**arguments)
    return prune(m, built, tokens(), Request(sparsity, **request), Runtime(batch=2))


def widths(m: Model) -> dict[str, list[int]]:
    """Count heads and neurons from the arrays, without the project's own functions."""
    h = m.arch.config.head_dim
    up = "fc1" if m.arch.slots[-1].name == "fc2" else "up"
    return {
        "heads": [block.k.w.shape[0] // h for block in m.blocks],
        "neurons": [getattr(block, up).w.shape[0] for block in m.blocks],
    }


def rows_of(block: Block, units: list[int], h: int) -> np.ndarray:
    """Return the key rows of some head units."""
    return np.asarray(block.k.w).reshape(-1, h, block.k.w.shape[1])[units].reshape(-1, 16)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param("llama-gqa", ("flap", {"structure": "AL-AM"}), marks=pytest.mark.slow),
        *(pytest.param("llama", case, marks=pytest.mark.slow) for case in UNITS),
        pytest.param("opt", ("wanda_sp", {"scope": "global"}), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_a_second_round_counts_the_units_of_every_block(
    family: str, case: tuple[str, dict[str, Any]]
) -> None:
    before = model(family, ragged=True)
    after, outcome = again(before, *case)
    check_counts(before, after, outcome)
    assert np.isfinite(logits(after, tokens())).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flap", "wanda_sp", "magnitude_sp", "llmrank"])
def test_two_rounds_over_all_blocks_follow_each_other(method: str) -> None:
    choice = {"structure": "AL-AM"} if method == "flap" else {"scope": "global"}
    dense = model("llama")
    once, first = again(dense, method, choice)
    check_counts(dense, once, first)
    assert len(set(widths(once)["neurons"])) > 1
    check_counts(once, *again(once, method, choice))


def check_counts(before: Model, after: Model, outcome: Outcome) -> None:
    """Compare the outcome's counts with the shapes of the arrays."""
    h, came_in, left = before.arch.config.head_dim, widths(before), widths(after)
    units = outcome.details["units"]
    for group, counts in units.items():
        assert counts == came_in[group]
        kept = outcome.details[f"kept_{group}"]
        # A block that lost all units keeps one of zeros, as no format has empty matrices.
        assert [max(1, len(k)) for k in kept] == left[group]
        (drawn,) = [f for f in outcome.figures if isinstance(f, KeptMap) and f.unit == group]
        cells = [[c for c in row if c is not None] for row in drawn.kept]
        assert [sum(row) for row in cells] == [len(k) for k in kept]
        assert [len(row) for row in cells] == came_in[group]
    for group in came_in.keys() - units.keys():
        assert left[group] == came_in[group]
    for i, kept in enumerate(outcome.details.get("kept_heads", ())):
        if kept:
            expected = rows_of(before.blocks[i], kept, h)
            np.testing.assert_array_equal(after.blocks[i].k.w, expected)
        removed = outcome.removed[i]["k"].rows
        assert sorted([*removed, *rows_in(kept, h)]) == list(range(len(before.blocks[i].k.w)))


def rows_in(units: list[int], width: int) -> list[int]:
    return [unit * width + k for unit in units for k in range(width)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ROWS, ids=name_of)
def test_rows_of_blocks_of_different_widths_are_zeroed(case: tuple[str, dict[str, Any]]) -> None:
    before = model("llama", ragged=True)
    after, outcome = again(before, *case)
    assert widths(after) == widths(before)
    for i, zero in enumerate(zeros(after)):
        for slot in ("up", "down"):
            rows = np.flatnonzero(zero[slot].all(axis=1))
            assert tuple(rows) == outcome.removed[i][slot].rows


@pytest.mark.slow
def test_blocks_of_different_widths_can_be_removed_whole() -> None:
    before = model("llama-gqa", ragged=True)
    after, outcome = again(before, "sleb", {"latter_barrier": 0, "repair": "none"}, 0.34)
    assert outcome.kept_blocks is not None and len(outcome.kept_blocks) == 2
    assert same(after.blocks, tuple(before.blocks[i] for i in outcome.kept_blocks))
    zeroed, outcome = again(before, "sleb", {"early_barrier": 0, "units": "sublayers"}, 0.34)
    assert len(outcome.details["removal_order"]) == 2
    kept = outcome.kept_blocks or range(3)
    assert widths(zeroed) == {
        group: [counts[i] for i in kept] for group, counts in widths(before).items()
    }


@pytest.mark.parametrize(
    "method", ["magnitude", *(pytest.param(m, marks=pytest.mark.slow) for m in WEIGHTS)]
)
def test_weights_of_blocks_of_different_widths_are_removed(method: str) -> None:
    before = model("llama", ragged=True)
    after, outcome = again(before, method, {}, 0.5)
    assert widths(after) == widths(before)
    for i, zero in enumerate(zeros(after)):
        for slot, mask in zero.items():
            assert abs(mask.mean() - outcome.asked[i][slot]) <= 1 / min(mask.shape) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["owl", "alpha"])
def test_a_budget_is_spread_over_blocks_of_different_widths(allocation: str) -> None:
    before = model("llama", ragged=True)
    after, _ = again(before, "wanda", {}, 0.5, allocation=ALLOCATIONS[allocation]())
    masks = [mask for block in zeros(after) for mask in block.values()]
    removed, total = sum(m.sum() for m in masks), sum(m.size for m in masks)
    assert removed / total == pytest.approx(0.5, abs=0.03)


def test_the_first_block_is_not_the_widest() -> None:
    for config in RAGGED.values():
        for counts in config["widths"].values():
            assert counts[0] < max(counts)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_widths_that_are_rounded_up_with_zeros_give_the_same_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs that the next block sees come from few programs, whatever the widths."""
    dense, models, programs = deep(family, 8), [], []
    for most in (99, 2):
        monkeypatch.setattr(remove, "WIDTHS", most)
        monkeypatch.setattr(widths_module, "WIDTHS", most)
        flap = METHODS["flap"](structure="AL-AM", refit=True)
        recorder = Recorder()
        with record_programs(recorder):
            models.append(prune(dense, flap, tokens(), Request(0.3), Runtime(batch=2))[0])
        programs.append(sum(cost.name == "pruned block" for cost in recorder.costs))
    exact, rounded = models
    assert widths(exact) == widths(rounded)
    assert programs[1] < programs[0]
    for a, b in zip(exact.blocks, rounded.blocks, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-4 * float(np.abs(x).max()))
