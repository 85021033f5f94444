"""The table of contents: every method and allocation by the name a user writes, each a few lines of composition."""

from collections.abc import Callable
from typing import Literal

from calibration.observers import second_moment
from pruning import patterns, scores
from pruning.allocate import uniform
from pruning.lift import per_linear, scored
from pruning.llmrank import llmrank
from pruning.types import Allocator, Method, Pattern, Pruner


def magnitude(scope: Literal["matrix", "row"] = "matrix") -> Method:
    """Magnitude pruning: the smallest |W| go. No calibration data.

    Args:
      scope: one threshold for a whole matrix, as Wanda's repository has it, or the smallest of each row, as NeuroAL's.
    """

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(None, scored(scores.magnitude, pattern.keep))

    return per_linear(pruner, patterns.per_matrix if scope == "matrix" else patterns.per_row)


def wanda() -> Method:
    """Wanda (Sun et al. 2024): in each row, the smallest |W| times the norm of the input channel go; what stays is not changed."""

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(second_moment, scored(scores.wanda, pattern.keep))

    return per_linear(pruner, patterns.per_row)


METHODS: dict[str, Callable[..., Method]] = {"magnitude": magnitude, "wanda": wanda, "llmrank": llmrank}
ALLOCATIONS: dict[str, Callable[..., Allocator]] = {"uniform": lambda: uniform}
