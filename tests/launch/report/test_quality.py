"""Each threshold judges numbers on both sides of it, and the page shows it without colour."""

import math
from typing import Any

import numpy as np
import pytest

from eval.perplexity import Perplexity
from launch.report import html as report
from launch.report import summary
from launch.report.quality import lights, repetition
from launch.report.quality_plots import perplexity_bars

LEAST: dict[str, Any] = {"model": "m", "method": "wanda", "sparsity": {"per_linear": {}}}


def states(**parts: Any) -> list[str]:
    return [light.state for light in lights(parts)]


@pytest.mark.parametrize(
    ("pruned", "state"),
    [
        (9.0, "good"),
        (10.0, "good"),
        (10.01, "check"),
        (16.0, "check"),
        (16.01, "poor"),
        (math.inf, "poor"),
        (math.nan, "poor"),
    ],
)
def test_perplexity_is_judged_by_its_ratio(pruned: float, state: str) -> None:
    assert states(perplexity={"d": {"dense": 8.0, "pruned": pruned}}) == [state]


@pytest.mark.parametrize(
    ("dense", "pruned", "state"),
    [(0.5, 0.4, "good"), (0.5, 0.29, "good"), (0.5, 0.28, "poor"), (0.26, 0.26, "check")],
)
def test_accuracy_is_judged_against_guessing(dense: float, pruned: float, state: str) -> None:
    tasks = {
        "t": {
            which: {"acc": v, "acc_stderr": 0.015}
            for which, v in (("dense", dense), ("pruned", pruned))
        }
    }
    assert states(tasks=tasks, protocol={"tasks": {"t": {"chance": 0.25}}}) == [state]
    assert states(tasks=tasks, protocol={"tasks": {"t": {}}}) == [], (
        "a task without a known chance is not judged"
    )


def test_texts_are_judged_by_repeated_sequences() -> None:
    assert repetition("a b c d e f") == 0.0 and repetition("a b") == 0.0
    assert repetition("a a a a a a") == 0.75  # four sequences of three, all the same
    said = {"prompt": "", "dense": "one two three four five six"}
    assert states(samples=[said | {"pruned": "and then a cat came by"}]) == ["good"]
    assert states(samples=[said | {"pruned": "the the the the the the"}]) == ["poor"]
    assert states(samples=[said | {"pruned": ""}]) == ["check"]
    assert states(samples=[{"dense": "a a a a a a", "pruned": "b b b b b b"}]) == ["good"], (
        "no worse than the dense model"
    )


def test_checks_sparsity_and_draws_are_judged() -> None:
    back = {"topiary": "0", "transformers": "cannot load it"}
    assert states(checks={"topiary": True, "transformers": False}, load_back=back) == [
        "good",
        "poor",
    ]
    assert states(checks={"transformers": None}, load_back=back) == ["check"]
    assert states(sparsity={"target": 0.5, "prunable": 0.504}) == ["good"]
    assert states(sparsity={"target": 0.5, "prunable": 0.49}) == ["check"]
    of = {"mean": 10.0, "min": 9.0, "max": 11.0}
    assert states(spread={"perplexity": {"a": of | {"std": 0.5}, "b": of | {"std": 0.6}}}) == [
        "good",
        "check",
    ]
    assert states() == []


def test_the_page_shows_shape_word_and_limit() -> None:
    page = report.render(LEAST | {"perplexity": {"d": {"dense": 8.0, "pruned": 80.0}}})
    mark = '<span class="mark" aria-hidden="true">■</span>'
    assert f"{mark} <strong>Poor</strong> Perplexity, d: 10.000x" in page
    assert "poor: above 2x" in page and "Quality at a glance" not in report.render(LEAST)


def test_the_standard_error_of_a_perplexity_is_that_of_many_draws() -> None:
    ce = np.array([1.0, 1.2, 1.4, 0.8])
    error = Perplexity(math.exp(1.1), ce, 4).error
    assert error == pytest.approx(math.exp(1.1) * np.std(ce, ddof=1) / 2)
    draws = np.exp(np.random.default_rng(0).normal(1.1, np.std(ce, ddof=1), (20000, 4)).mean(1))
    assert error == pytest.approx(draws.std(), rel=0.03)
    assert (
        Perplexity(2.0, ce[:1], 1).error is None
        and Perplexity(math.inf, np.array([1.0, math.inf]), 2).error is None
    )


def test_error_bars_are_drawn_and_explained() -> None:
    figures = {"dense": 8.0, "pruned": 9.0, "tokens": 10}
    with_errors = figures | {"dense_stderr": 0.5, "pruned_stderr": 0.25}
    assert perplexity_bars({"d": with_errors}) != perplexity_bars({"d": figures})
    row = summary.quality_rows({"perplexity": {"d": with_errors}})[0]
    assert (row.dense, row.pruned) == ("8.000 ± 0.500", "9.000 ± 0.250")
    assert "one standard error over windows" in report.render(
        LEAST | {"perplexity": {"d": with_errors}}
    )
    assert "one standard error over windows" not in report.render(
        LEAST | {"perplexity": {"d": figures}}
    )
