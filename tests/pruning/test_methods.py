"""The tables of methods: names, parameters, defaults, and compositions against NumPy."""

import inspect
import typing

import numpy as np
import pytest

from calibration.runtime import Runtime
from models.errors import InputError
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS
from pruning.types import Layerwise, Pruner, Request, prune, reads_activations
from pruning.weights.patterns import per_row
from pruning.weights.score_solver import score_solver
from pruning.weights.scores import magnitude
from reference import wanda as reference
from reference.small import FAMILIES, model, same, tokens, weight, zeros

SLOW = ("neuroal", "dsnot")


def test_the_names_of_the_contract_exist() -> None:
    """Users of CONTRACT.md write these; more may come."""
    assert {"magnitude", "wanda", "llmrank"} <= METHODS.keys()
    assert {"uniform", "owl", "alpha", "neuroal"} <= ALLOCATIONS.keys()
    assert {"none", "dsnot"} <= REFINEMENTS.keys()


@pytest.mark.parametrize(
    "name", [*METHODS, "owl", "alpha", "neuroal", "dsnot", "dlp", "lsa", "atp"]
)
def test_every_method_is_documented_has_defaults_and_literal_types(name: str) -> None:
    """`launch` builds methods from text, so parameters need defaults and checkable types."""
    maker = {**METHODS, **ALLOCATIONS, **REFINEMENTS}[name]
    assert maker.__doc__ and len(maker.__doc__) > 40
    hints = typing.get_type_hints(maker)
    for parameter in inspect.signature(maker).parameters.values():
        assert parameter.default is not parameter.empty
        assert parameter.name in hints
        assert f"{parameter.name}:" in maker.__doc__


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_has_one_threshold_a_matrix(family: str) -> None:
    m = model(family)
    pruned, _ = prune(m, METHODS["magnitude"](), tokens(), Request(0.6))
    for block, gone in zip(m.blocks, zeros(pruned), strict=True):
        for slot, zero in gone.items():
            assert np.array_equal(
                zero, reference.removed_per_matrix(np.abs(weight(block, slot)), 0.6)
            ), slot


def test_magnitude_by_row_and_by_group() -> None:
    m = model("llama")
    by_row, _ = prune(m, METHODS["magnitude"](scope="row"), tokens(), Request(0.6))
    by_group, _ = prune(m, METHODS["magnitude"](), tokens(), Request(0.375, (3, 8)))
    for block, row, group in zip(m.blocks, zeros(by_row), zeros(by_group), strict=True):
        for slot in row:
            w = np.abs(weight(block, slot))
            assert np.array_equal(
                row[slot], reference.removed_per_row(w, np.full(len(w), int(0.6 * w.shape[1])))
            ), slot
            assert np.array_equal(group[slot], reference.removed_n_of_m(w, 3, 8)), slot


def test_wanda_looks_at_activations() -> None:
    """tests/pruning/weights/test_per_linear.py has its masks in full."""
    m = model("llama")
    wanda, _ = prune(m, METHODS["wanda"](), tokens(), Request(0.5))
    others, _ = prune(m, METHODS["wanda"](), tokens(seed=1), Request(0.5))
    magnitude, _ = prune(m, METHODS["magnitude"](scope="row"), tokens(), Request(0.5))
    assert not same(wanda.blocks, magnitude.blocks)
    assert not same(wanda.blocks, others.blocks)


def test_ria_has_one_threshold_a_matrix_or_a_row() -> None:
    m = model("llama")
    by_matrix, by_row, sizes_alone = (
        prune(m, METHODS["ria"](**arguments), tokens(), Request(0.5))[0]
        for arguments in ({}, {"scope": "row"}, {"power": 0.0})
    )
    assert all((zero.sum(axis=1) == zero.shape[1] // 2).all() for zero in zeros(by_row)[0].values())
    assert any(np.ptp(zero.sum(axis=1)) for zero in zeros(by_matrix)[0].values())
    assert not same(by_matrix.blocks, sizes_alone.blocks)
    with pytest.raises(InputError, match="power=-1"):
        METHODS["ria"](power=-1.0)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_wanda_does_not_care_how_windows_are_batched(batch: int) -> None:
    m = model("opt")
    whole, parts = (
        prune(m, METHODS["wanda"](), tokens(), Request(0.5), Runtime(batch=b))[0]
        for b in (6, batch)
    )
    assert same(whole.blocks, parts.blocks)


@pytest.mark.parametrize(
    "name",
    [
        "uniform",
        "owl",
        "alpha",
        "dlp",
        "lsa",
        *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW),
    ],
)
def test_other_windows_change_budgets_and_swaps_that_read_activations_alone(name: str) -> None:
    """After magnitude, which reads none itself; `row` as NeuroAL's rows need it."""
    refine = REFINEMENTS[name]() if name in REFINEMENTS else None
    arguments = {"m": 2} if name == "owl" else {}  # this model has no outliers above 5 means
    allocation = ALLOCATIONS[name](**arguments) if name in ALLOCATIONS else None
    m, method = model("llama"), METHODS["magnitude"](scope="row")
    request = Request(0.5, allocation=allocation, refine=refine)
    runs = [prune(m, method, tokens(seed=seed), request) for seed in (0, 1)]
    (some, of_some), (others, of_others) = runs
    equal = same(some.blocks, others.blocks) and of_some.details == of_others.details
    assert equal == (not reads_activations(method, request))


def test_uniform_is_the_same_everywhere() -> None:
    m = model("llama-gqa")
    pruner = Pruner(None, score_solver(magnitude, per_row.keep))
    budget = ALLOCATIONS["uniform"]()(
        m, tokens(), Request(0.3), Runtime(), Layerwise(pruner, per_row)
    ).budget
    assert len(budget) == 3
    assert all(fractions == {s.name: 0.3 for s in m.arch.slots} for fractions in budget)
