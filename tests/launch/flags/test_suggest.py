"""Misspelt names are answered by the name that is meant, and others by none."""

import pytest

from launch.flags.calls import build
from launch.flags.cli import Flags
from launch.flags.numbers import check_sparsity
from launch.flags.suggest import closest, one_of
from launch.prune import options
from models.errors import InputError
from pruning.methods import ALLOCATIONS, METHODS, REFINEMENTS


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("wnada", "wanda"),
        ("Wanda-SP", "wanda_sp"),
        ("sparcegpt", "sparsegpt"),
        ("magnitud", "magnitude"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_the_closest_method(word: str, meant: str) -> None:
    assert closest(word, METHODS) == meant


def test_a_remedy_lists_all_names_too() -> None:
    assert one_of("owk", ["alpha", "owl"]) == "did you mean owl? there are alpha, owl"
    assert one_of("zebra", ["alpha", "owl"]) == "there are alpha, owl"


@pytest.mark.parametrize(
    ("field", "text", "makers", "meant"),
    [
        ("method", "wandaa", METHODS, "did you mean wanda?"),
        ("allocation", "owll(m=7)", ALLOCATIONS, "did you mean owl?"),
        ("refine", "dsnott", REFINEMENTS, "did you mean dsnot?"),
        ("method", "llmrank(scoer='mpr')", METHODS, "did you mean scorer?"),
    ],
)
def test_names_in_calls(field: str, text: str, makers: dict, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        build(field, text, makers)
    assert meant in str(caught.value) and caught.value.field == field


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--sparsty=0.5", "did you mean --sparsity?"),
        ("--calibration-samples=8", "did you mean --calibration_samples?"),
        ("--sparsity=50%", "did you mean 0.5?"),
        ("--protocol=wanda2047", "did you mean wanda2048?"),
    ],
)
def test_flags(argument: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        options().parse([argument])
    assert meant in str(caught.value)


def test_a_flag_that_is_like_no_other_has_no_suggestion() -> None:
    with pytest.raises(InputError, match=r"^--zzz is no flag: python -m launch.x --help"):
        Flags("launch.x", "").parse(["--zzz=1"])


@pytest.mark.parametrize(("given", "meant"), [(50, "0.5"), (12.5, "0.125"), (2, "0.02")])
def test_percentages_are_answered_by_the_fraction(given: float, meant: str) -> None:
    with pytest.raises(InputError, match=f"sparsity={given:g} must") as caught:
        check_sparsity(given)
    assert f"did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("given", [1, 100, -0.5, float("nan"), float("inf"), 1e300])
def test_other_numbers_are_no_percentages(given: float) -> None:
    with pytest.raises(InputError) as caught:
        check_sparsity(given)
    assert "did you mean" not in str(caught.value)
