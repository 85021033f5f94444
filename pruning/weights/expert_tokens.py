"""Experts that saw few calibration tokens: counted, pruned by magnitude, and named."""

from collections.abc import Mapping
from typing import Any

import jax

from calibration.observers import Observer, token_counts
from models.experts import EXPERT_TOKENS, expert_of
from pruning.types import FEW_TOKENS, Pattern, Pruner
from pruning.weights import scores
from pruning.weights.score_solver import score_solver

FEW = "tokens_of_experts_by_magnitude"  # what details call them


def with_token_counts(watch: Mapping[str, Observer]) -> dict[str, Observer]:
    """Return the observers with that of the experts' tokens, where experts are observed.

    Args:
      watch: Tap -> observer.
    """
    of_experts = any(expert_of(tap)[1] is not None for tap in watch)
    return {**watch, EXPERT_TOKENS: token_counts} if of_experts else dict(watch)


def pruner_of(
    pruners: Mapping[str, Pruner], pattern: Pattern, stats: Mapping[str, Any], tap: str
) -> tuple[Pruner, Mapping[str, jax.Array]]:
    """Return the pruner of a tap: by magnitude where an expert saw too few tokens.

    Args:
      pruners: Tap -> pruner.
      pattern: Turns scores into masks.
      stats: Tap -> statistics, with the tokens of each expert.
      tap: Name of the tap.

    Returns:
      The pruner, and its figures: the tokens of an expert that saw too few.
    """
    expert = expert_of(tap)[1]
    if expert is None or pruners[tap].observer is None:
        return pruners[tap], {}
    tokens = stats[EXPERT_TOKENS][expert]
    if tokens >= FEW_TOKENS:
        return pruners[tap], {}
    return Pruner(None, score_solver(scores.magnitude, pattern.keep_whole)), {FEW: tokens}


def few_token_warnings(details: Mapping[str, Any]) -> list[str]:
    """Return a sentence that names the experts that were pruned by magnitude.

    Args:
      details: Figures of the outcome.
    """
    few = {
        f"block {i}, expert {expert_of(tap)[1]}: {tokens:.0f}"
        for i, taps in enumerate(details.get(FEW, ()))
        for tap, tokens in taps.items()
    }
    if not few:
        return []
    listed = sorted(few)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return [
        f"{len(listed)} experts were pruned by magnitude, as fewer than {FEW_TOKENS} calibration "
        f"tokens reached them ({'; '.join(listed[:5])}{more})"
    ]
