"""Quality lights: whether a pruned model's figures look right, each by a stated threshold, as a mark with words.

The thresholds are rules of thumb for a first look, not results of a paper; docs/quality.md lists them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launch.report import summary
from launch.report.figures import MISSED

MARKS = {"good": "●", "look": "▲", "bad": "■"}  # told apart by shape too
RATIO = (
    1.25,
    2.0,
)  # of perplexities, pruned over dense: more than the first is worth a look, more than the second is bad
CHANCE = 2.0  # standard errors: an accuracy that is not so far above guessing is at chance
REPEATED = (0.2, 0.5)  # more of the text repeated than in the dense model's
GRAM = 3  # words that count as repeated when they came before in the same text
SPREAD = 0.05  # standard deviation of perplexity over calibration draws, of its mean


class Light(NamedTuple):
    """state: "good", "look" or "bad"; what: was looked at; said: the figures, and the threshold."""

    state: str
    what: str
    said: str

    @property
    def mark(self) -> str:
        """Its shape."""
        return MARKS[self.state]


def _state(value: float, steps: Sequence[float]) -> str:
    """By how many of two steps a value is over; what is not a number is over both."""
    return "good" if value <= steps[0] else "look" if value <= steps[1] else "bad"


def lights(report: Mapping[str, Any]) -> list[Light]:
    """A light for each figure of a report that can be judged; any part of it may be missing."""
    return [
        *_perplexities(report),
        *_accuracies(report),
        *_texts(report),
        *_checks(report),
        *_spreads(report),
    ]


def _perplexities(report: Mapping[str, Any]) -> Iterator[Light]:
    limits = f"up to {RATIO[0]:g}x is good, over {RATIO[1]:g}x is bad"
    for name, found in report.get("perplexity", {}).items():
        dense, pruned = found.get("dense"), found.get("pruned")
        if dense is None or pruned is None or not math.isfinite(dense) or dense <= 0:
            continue
        said = (
            f"{summary.ratio(dense, pruned)} the dense model's"
            if math.isfinite(pruned)
            else "not finite"
        )
        yield Light(_state(pruned / dense, RATIO), f"perplexity, {name}", f"{said} ({limits})")


def _accuracies(report: Mapping[str, Any]) -> Iterator[Light]:
    chances = {
        name: facts.get("chance")
        for name, facts in report.get("protocol", {}).get("tasks", {}).items()
    }
    for m in summary.metrics(report.get("tasks", {})):
        chance = chances.get(m.task)
        if not m.fraction or chance is None or not m.dense or not m.pruned:
            continue
        fallen = m.pruned[0] <= chance + CHANCE * (m.pruned[1] or 0.0)
        never = m.dense[0] <= chance + CHANCE * (m.dense[1] or 0.0)
        said = f"{summary.measured(m.pruned, True)}, guessing gives {summary.percent(chance)}"
        said += (
            ": the dense model guesses too"
            if never
            else ": no better than guessing"
            if fallen
            else ""
        )
        state = "look" if never else "bad" if fallen else "good"
        yield Light(
            state, f"{m.task}, {m.name}", f"{said} ({CHANCE:g} standard errors above it are good)"
        )


def repetition(text: str) -> float:
    """The share of a text's runs of GRAM words that came before in it; 0 for a text that is too short to have two."""
    words = text.split()
    grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
    return 1 - len(grams) / grams.total() if grams.total() > 1 else 0.0


def _texts(report: Mapping[str, Any]) -> Iterator[Light]:
    samples = report.get("samples") or []
    if not samples:
        return
    dense, pruned = (
        sum(repetition(s[which]) for s in samples) / len(samples) for which in ("dense", "pruned")
    )
    empty = sum(not s["pruned"].strip() for s in samples)
    said = f"{summary.percent(pruned)} of its runs of {GRAM} words are repeated, {summary.percent(dense)} of the dense model's"
    said += f"; {empty} of {len(samples)} continuations are empty" if empty else ""
    limits = f"up to {summary.percent(REPEATED[0])} more is good, over {summary.percent(REPEATED[1])} more is bad"
    state = _state(pruned - dense, REPEATED)
    yield Light(
        "look" if empty and state == "good" else state, "what it says", f"{said} ({limits})"
    )


def _checks(report: Mapping[str, Any]) -> Iterator[Light]:
    for library, found in report.get("checks", {}).items():
        state = "look" if found is None else "good" if found else "bad"
        yield Light(state, f"logits after writing, {library}", report["load_back"][library])
    sparsity = report.get("sparsity", {})
    got, target = sparsity.get("prunable"), sparsity.get("target")
    if got is not None and target is not None:
        said = f"{summary.percent(got)}, asked {summary.percent(target)} (within {100 * MISSED:g} points is good)"
        yield Light("good" if abs(got - target) <= MISSED else "look", "sparsity", said)


def _spreads(report: Mapping[str, Any]) -> Iterator[Light]:
    for name, found in report.get("spread", {}).get("perplexity", {}).items():
        share = found["std"] / found["mean"]
        said = f"standard deviation {summary.percent(share)} of the mean (up to {summary.percent(SPREAD)} is good)"
        yield Light("good" if share <= SPREAD else "look", f"calibration draws, {name}", said)
