"""Methods with arguments that the contract's tests run, and their runs on small models."""

import functools
from typing import Any, NamedTuple

import pytest

from calibration.runtime import Runtime
from models.arch import Model
from pruning.methods import METHODS
from pruning.types import Outcome, Request, prune
from reference.small import EVERY_FAMILY, FAMILIES, model, tokens


class Case(NamedTuple):
    """A method with arguments; hashable, so that runs can be cached."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return " ".join((self.name, *(str(v) for _, v in self.arguments)))


ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{}, {"scope": "row"}],
    "ria": [{}, {"scope": "row"}],
    "sparsellm": [{}, {"solver": "admm"}, {"variant": "official"}],
    "admm": [{}, {"targets": "own"}, {"scope": "matrix"}, {"variant": "official"}],
    "llmrank": [
        {},
        {"scorer": "mpr", "zero_pruned": True},
        {"scorer": "norm", "units": "rows"},
        {"scorer": "random"},
        {"scorer": "wanda", "scope": "global", "units": "rows", "variant": "official"},
        {"scorer": "mpr", "chain": False, "variant": "official"},
    ],
    "flap": [
        {},
        {"structure": "AL-AM"},
        {"structure": "UL-UM", "bias": False},
        {"metric": "WIFN", "structure": "UL-MM", "heads_removed": 3},
        {"metric": "IFV", "structure": "AL-MM", "heads_removed": 2, "refit": True},
        {"variant": "official"},
    ],
    # Three blocks: with the released code's barriers, two could not go.
    "two_ssp": [{}, {"repair": "none", "windows": 0}],
    "sleb": [
        {"latter_barrier": 0},
        {"latter_barrier": 0, "variant": "official"},
        {"latter_barrier": 0, "search": "perplexity", "repair": "none"},
        {"latter_barrier": 0, "search": "influence", "repair": "scale"},
        {"latter_barrier": 0, "search": "contiguous", "repair": "refit"},
        {"latter_barrier": 0, "search": "similarity"},
        {"early_barrier": 0, "units": "sublayers"},
        {"early_barrier": 0, "latter_barrier": 0, "search": "evolution", "repair": "none"},
    ],
}
# REAP removes experts, which most families do not have: tests/pruning/structured/test_reap.py.
EVERYWHERE = [name for name in METHODS if name != "reap"]
CASES = [Case(name, tuple(a.items())) for name in EVERYWHERE for a in ARGUMENTS.get(name, [{}])]
WEIGHTS = [
    c
    for c in CASES
    if c.name not in ("llmrank", "flap", "wanda_sp", "magnitude_sp", "sleb", "minitron", "two_ssp")
]  # methods that zero single weights
UNITS = [c for c in CASES if c not in WEIGHTS]
BLOCKS = [c for c in CASES if c.name == "sleb"]
LLMRANK = [c for c in CASES if c.name == "llmrank"]
ALIKE = [
    c
    for c in UNITS
    if c not in BLOCKS
    and c.name not in ("minitron", "two_ssp")
    and (c.name != "flap" or dict(c.arguments).get("structure") == "UL-UM")
]  # as many in each block


def quick(cases: list[Case], names: tuple[str, ...] = tuple(METHODS)) -> list[Any]:
    """Mark slow all but the first case of each named method."""
    first = {c.name: c for c in reversed(cases) if c.name in names}.values()
    return [c if c in first else pytest.param(c, marks=pytest.mark.slow) for c in cases]


# The quick tests take every method's first arguments and the first family, the slow ones the rest.
every_case = pytest.mark.parametrize("case", quick(CASES), ids=str)
every_family = pytest.mark.parametrize(
    "family",
    [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])],
)

# Rules for one linear or one set of channels know nothing of a family: dense ones have Wanda alone.
GENERIC = ("magnitude", "multiflow", "ria", "wanda_sp", "magnitude_sp")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
FIRST_CASES = [next(c for c in CASES if c.name == name) for name in EVERYWHERE]
first_case_of_other_families = pytest.mark.parametrize(
    ("case", "family"),
    [
        (case, family)
        for family in EVERY_FAMILY[len(FAMILIES) :]
        for case in FIRST_CASES
        if family in MIXTURES or case.name not in GENERIC
    ],
    ids=str,
)


ONE_DEVICE = Runtime()


def fresh(
    case: Case, m: Model, sparsity: float, runtime: Runtime = ONE_DEVICE, **options: Any
) -> tuple[Model, Outcome]:
    """Run the case on its own."""
    method = METHODS[case.name](**dict(case.arguments))
    return prune(m, method, tokens(), Request(sparsity, **options), runtime)


@functools.cache
def run(case: Case, family: str) -> tuple[Model, Outcome]:
    """The run at sparsity 0.5 that several tests look at."""
    return fresh(case, model(family), 0.5)


def covered(m: Model, outcome: Outcome) -> list[tuple[int, str]]:
    """The linears that the method says it covers."""
    return [
        (i, slot) for i, asked in enumerate(outcome.asked) for slot in asked if i < len(m.blocks)
    ]
