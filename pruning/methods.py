"""The table of contents: every method and allocation by the name a user writes, each a few lines of composition."""

from collections.abc import Callable
from typing import Literal

from calibration.observers import second_moment
from pruning.allocation.alpha import alpha
from pruning.allocation.neuroal import neuroal
from pruning.allocation.owl import owl
from pruning.budget import uniform
from pruning.structured.channel_methods import magnitude_sp, wanda_sp
from pruning.structured.flap import Flap
from pruning.structured.llmrank import LLMRank
from pruning.structured.sleb import Sleb
from pruning.types import Allocator, Method, Pattern, Pruner, Refiner
from pruning.weights import patterns, scores
from pruning.weights.dsnot import dsnot
from pruning.weights.per_linear import PerLinear, score_solver
from pruning.weights.sparsegpt import sparsegpt
from pruning.weights.sparsellm import SparseLLM


def magnitude(scope: Literal["matrix", "row"] = "matrix") -> PerLinear:
    """Magnitude pruning: the smallest |W| go. No calibration data.

    Args:
      scope: one threshold for a whole matrix, as Wanda's repository has it, or the smallest of each row, as NeuroAL's.
    """

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(None, score_solver(scores.magnitude, pattern.keep))

    return PerLinear(pruner, patterns.per_matrix if scope == "matrix" else patterns.per_row)


def wanda() -> PerLinear:
    """Wanda (Sun et al. 2024): in each row, the smallest |W| times the norm of the input channel go; what stays is not changed."""

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(second_moment, score_solver(scores.wanda, pattern.keep))

    return PerLinear(pruner, patterns.per_row)


def multiflow() -> PerLinear:
    """MULTIFLOW (Farina et al. 2024) as NeuroAL's authors use it: in each row, the weights that carry the least flow go."""

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(second_moment, score_solver(scores.multiflow, pattern.keep))

    return PerLinear(pruner, patterns.per_row)


METHODS: dict[str, Callable[..., Method]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "multiflow": multiflow,
    "sparsegpt": sparsegpt,
    "sparsellm": SparseLLM,
    "llmrank": LLMRank,
    "flap": Flap,
    "wanda_sp": wanda_sp,
    "magnitude_sp": magnitude_sp,
    "sleb": Sleb,
}
ALLOCATIONS: dict[str, Callable[..., Allocator]] = {
    "uniform": lambda: uniform,
    "owl": owl,
    "alpha": alpha,
    "neuroal": neuroal,
}
REFINEMENTS: dict[str, Callable[..., Refiner | None]] = {"none": lambda: None, "dsnot": dsnot}
