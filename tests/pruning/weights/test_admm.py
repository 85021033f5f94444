"""ADMM over a block and a model: targets by family, budgets, variants, what it composes with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from calibration.runtime import Runtime
from models.arch import Model, embed
from models.errors import InputError
from pruning.methods import METHODS
from pruning.types import Allocation, Request, prune
from pruning.weights.admm_block import error_sources
from pruning.weights.dsnot import DSnoT
from reference import admm as reference
from reference.small import model, run_block, tokens, weight, zeros

SERIAL = [
    ("attn_in", ["q", "k", "v"]),
    ("attn_mid", ["o"]),
    ("mlp_in", ["gate", "up"]),
    ("mlp_mid", ["down"]),
]
PLAIN = [*SERIAL[:2], ("mlp_in", ["up"]), SERIAL[3]]
PARALLEL = [("attn_in", ["q", "k", "v", "up"]), SERIAL[1], SERIAL[3]]
# Stages of a family, the slot that makes good the branch before it, and the scale of branches.
FAMILIES: Mapping[str, tuple[Any, str, float]] = {
    "llama": (SERIAL, "down", 1.0),
    "granite": (SERIAL, "down", 0.5),
    "phi": (PARALLEL, "down", 1.0),
    "gemma2": (SERIAL, "", 1.0),
}
slow = pytest.mark.slow


class BudgetOfRows:
    """An allocation that gives every row another fraction."""

    reads_activations = False

    def __call__(self, model: Model, *_: Any) -> Allocation:
        shapes = [
            {s.name: getattr(b, s.name).w.shape for s in model.arch.slots} for b in model.blocks
        ]
        return Allocation(
            tuple({n: np.linspace(0.25, 0.75, rows) for n, (rows, _) in s.items()} for s in shapes)
        )


def blocks_of(m: Model, request: Request, **arguments: Any) -> Any:
    return prune(m, METHODS["admm"](**arguments), tokens(), request, Runtime(batch=4))[0].blocks


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=slow) for f in FAMILIES if f != "llama")]
)
def test_a_block_is_solved_in_turn_toward_the_dense_block(family: str) -> None:
    m, (stages, last, scale) = model(family), FAMILIES[family]
    x = embed(m.arch, m.non_block, tokens())
    got = blocks_of(m, Request(0.5))[0]
    want = reference.solve_block(m, m.blocks[0], x, stages, last, 0.5, scale, damp=0.3)
    for slot, w in want.items():
        assert np.array_equal(weight(got, slot) == 0, w == 0), slot
        np.testing.assert_allclose(
            weight(got, slot), w, rtol=0, atol=1e-3 * np.abs(w).max(), err_msg=slot
        )


@slow
@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=["unstructured", "2:4"])
def test_the_official_variant_keeps_every_dense_output_by_one_threshold_a_matrix(
    pattern: tuple[int, int] | None,
) -> None:
    m = model("llama")
    x = embed(m.arch, m.non_block, tokens())
    got = blocks_of(m, Request(0.5, pattern), variant="official")[0]
    _, taps = run_block(m, m.blocks[0], x)
    for slot in m.arch.slots:
        inputs = taps[slot.reads].reshape(-1, taps[slot.reads].shape[-1])
        want, gone = reference.solve(
            weight(m.blocks[0], slot.name),
            inputs.T @ inputs,
            0.5,
            pattern=pattern,
            scope="matrix",
            released=True,
        )
        assert np.array_equal(weight(got, slot.name) == 0, gone), slot.name
        np.testing.assert_allclose(
            weight(got, slot.name), want, rtol=0, atol=1e-3 * np.abs(want).max()
        )


def test_a_branch_makes_good_only_what_adds_up_in_the_stream() -> None:
    """Not before it is pruned, not where a norm follows, and not inside a branch."""
    for family, sources in (("llama", ("down", "o")), ("gemma2", ("down",))):
        arch, solved = model(family).arch, ["q", "k", "v", "o", "gate", "up"]
        assert error_sources(arch, solved, ["down"]) == (sources,)
        assert error_sources(arch, solved[:3], ["o"]) == (("o",),)
        assert error_sources(arch, solved[:4], ["gate", "up"]) == (("gate",), ("up",))


def test_the_targets_of_the_block_lower_its_error() -> None:
    """On the windows of the calibration, against the outputs of the dense block."""
    m = model("llama")
    x = embed(m.arch, m.non_block, tokens())
    dense, _ = run_block(m, m.blocks[0], x)

    def error(targets: str) -> float:
        y, _ = run_block(m, blocks_of(m, Request(0.6), targets=targets)[0], x)
        return float(np.sum((np.asarray(y) - np.asarray(dense)) ** 2))

    assert error("block") < 0.9 * error("own")


def test_the_report_has_the_error_of_every_linear() -> None:
    _, outcome = prune(model("llama"), METHODS["admm"](), tokens(), Request(0.5))
    errors = outcome.details["error"]
    assert [set(of_block) for of_block in errors] == [
        {s.name for s in model("llama").arch.slots}
    ] * 3
    assert all(0 < e < 1 for of_block in errors for e in of_block.values())
    (figure,) = outcome.figures
    assert figure.series["down"] == [of_block["down"] for of_block in errors]


def test_a_budget_of_rows_reaches_the_rows() -> None:
    request = Request(0.5, allocation=BudgetOfRows())
    pruned, _ = prune(model("llama"), METHODS["admm"](), tokens(), request)
    for gone in zeros(pruned):
        for zero in gone.values():
            assert zero.sum(axis=1).tolist() == [
                int(f * zero.shape[1]) for f in np.linspace(0.25, 0.75, len(zero))
            ]


def test_own_targets_take_a_refinement_and_the_block_s_do_not() -> None:
    request = Request(0.5, refine=DSnoT())
    pruned, _ = prune(model("llama"), METHODS["admm"](targets="own"), tokens(), request)
    assert all(0.4 < zero.mean() < 0.6 for gone in zeros(pruned) for zero in gone.values())
    with pytest.raises(InputError, match="refine is for methods that prune each linear on its own"):
        prune(model("llama"), METHODS["admm"](), tokens(), request)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "admm: iterations=0 must be at least 1"),
        ({"damp": float("nan")}, "admm: damp=nan must not be negative"),
        ({"targets": "block", "variant": "official"}, 'targets="block" belongs to the corrected'),
    ],
)
def test_bad_arguments_are_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        METHODS["admm"](**arguments)


def test_one_threshold_a_matrix_takes_no_budget_of_rows() -> None:
    request = Request(0.5, allocation=BudgetOfRows())
    with pytest.raises(InputError, match="one threshold a matrix cannot follow it"):
        prune(model("llama"), METHODS["admm"](scope="matrix"), tokens(), request)
