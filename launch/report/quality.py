"""Judge a report's numbers as good, worth a check, or poor, each by a stated threshold.

The thresholds are rules of thumb for a first look, not results of a paper; docs/quality.md lists
them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from launch.report import summary
from launch.report.removal import TOLERANCE

State = Literal["good", "check", "poor"]

MARKS = {"good": "●", "check": "▲", "poor": "■"}  # shapes, for readers who see no colours
# Perplexity, pruned over dense: good up to the first, poor above the second.
RATIO = (1.25, 2.0)
# Fraction of repeated text, above the dense model's: good up to the first, poor above the second.
REPEATED = (0.2, 0.5)
GRAM = 3  # words in a sequence that counts as repeated
CHANCE = 2.0  # standard errors above guessing that make an accuracy good
SPREAD = 0.05  # good standard deviation of perplexity over calibration draws, relative to the mean


class Light(NamedTuple):
    """Judgement of one number.

    Attributes:
      state: "good", "check" or "poor".
      subject: Name of the number.
      text: Its value.
      limit: Its threshold; empty for a check that has none.
    """

    state: State
    subject: str
    text: str
    limit: str = ""

    @property
    def mark(self) -> str:
        """Return the shape of the state."""
        return MARKS[self.state]


def _state(value: float, limits: Sequence[float]) -> State:
    """Compare a value with the limits of good and of poor; NaN is poor."""
    if value <= limits[0]:
        return "good"
    return "check" if value <= limits[1] else "poor"


def lights(report: Mapping[str, Any]) -> list[Light]:
    """Judge every number of a report that has a threshold; any part of it may be missing."""
    return [
        *_perplexities(report),
        *_accuracies(report),
        *_texts(report),
        *_checks(report),
        *_sparsity(report),
        *_draws(report),
    ]


def _perplexities(report: Mapping[str, Any]) -> Iterator[Light]:
    data_sets = report.get("perplexity", {})
    labels = summary.short_names(data_sets)
    for name, scores in data_sets.items():
        dense, pruned = scores.get("dense"), scores.get("pruned")
        if dense is None or pruned is None or not math.isfinite(dense) or dense <= 0:
            continue
        text = "not finite"
        if math.isfinite(pruned):
            text = f"{summary.ratio(dense, pruned)} the dense model's"
        limit = f"good: at most {RATIO[0]:g}x, poor: above {RATIO[1]:g}x"
        yield Light(_state(pruned / dense, RATIO), f"Perplexity, {labels[name]}", text, limit)


def _accuracies(report: Mapping[str, Any]) -> Iterator[Light]:
    tasks = report.get("protocol", {}).get("tasks", {})
    for m in summary.metrics(report.get("tasks", {})):
        chance = tasks.get(m.task, {}).get("chance")
        if not m.fraction or chance is None or not m.dense or not m.pruned:
            continue
        text = f"{summary.measured(m.pruned, True)}, guessing gives {summary.percent(chance)}"
        state: State = "good"
        if m.dense[0] <= chance + CHANCE * (m.dense[1] or 0.0):
            state, text = "check", f"{text}; the dense model does not beat guessing either"
        elif m.pruned[0] <= chance + CHANCE * (m.pruned[1] or 0.0):
            state, text = "poor", f"{text}; no better than guessing"
        limit = f"good: more than {CHANCE:g} standard errors above guessing"
        yield Light(state, f"{m.task}, {m.name}", text, limit)


def repetition(text: str) -> float:
    """Return the fraction of a text's GRAM-word sequences that repeat an earlier one.

    Args:
      text: A continuation; one too short for two sequences has none repeated.
    """
    words = text.split()
    grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
    return 1 - len(grams) / grams.total() if grams.total() > 1 else 0.0


def _texts(report: Mapping[str, Any]) -> Iterator[Light]:
    samples = report.get("samples") or []
    if not samples:
        return
    dense = sum(repetition(s["dense"]) for s in samples) / len(samples)
    pruned = sum(repetition(s["pruned"]) for s in samples) / len(samples)
    empty = sum(not s["pruned"].strip() for s in samples)
    state = _state(pruned - dense, REPEATED)
    text = (
        f"{summary.percent(pruned)} of the {GRAM}-word sequences are repeats, "
        f"{summary.percent(dense)} for the dense model"
    )
    if empty:
        text += f"; {empty} of {len(samples)} continuations are empty"
        state = "check" if state == "good" else state
    good, poor = (f"{100 * limit:g}" for limit in REPEATED)
    limit = f"good: at most {good} points more, poor: above {poor} points"
    yield Light(state, "Sample texts", text, limit)


def _checks(report: Mapping[str, Any]) -> Iterator[Light]:
    for library, ok in report.get("checks", {}).items():
        state: State = "check" if ok is None else "good" if ok else "poor"
        yield Light(state, f"Loaded back with {library}", report["load_back"][library])


def _sparsity(report: Mapping[str, Any]) -> Iterator[Light]:
    sparsity = report.get("sparsity", {})
    reached, target = sparsity.get("prunable"), sparsity.get("target")
    if reached is not None and target is not None:
        state: State = "good" if abs(reached - target) <= TOLERANCE else "check"
        text = f"{summary.percent(reached)}, target {summary.percent(target)}"
        yield Light(state, "Sparsity", text, f"good: within {100 * TOLERANCE:g} points")


def _draws(report: Mapping[str, Any]) -> Iterator[Light]:
    data_sets = report.get("spread", {}).get("perplexity", {})
    labels = summary.short_names(data_sets)
    for name, spread in data_sets.items():
        relative = spread["std"] / spread["mean"]
        state: State = "good" if relative <= SPREAD else "check"
        text = f"standard deviation of perplexity is {summary.percent(relative)} of its mean"
        limit = f"good: at most {summary.percent(SPREAD)}"
        yield Light(state, f"Calibration draws, {labels[name]}", text, limit)
