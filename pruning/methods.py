"""The table of contents: every method and allocation by the name a user writes, each a few lines of composition."""

import functools
from collections.abc import Callable
from typing import Literal

from calibration.observers import second_moment
from models.errors import InputError
from pruning.allocation.alpha import alpha
from pruning.allocation.neuroal import neuroal
from pruning.allocation.owl import owl
from pruning.budget import uniform
from pruning.structured.flap import flap, magnitude_sp, wanda_sp
from pruning.structured.llmrank import llmrank
from pruning.structured.sleb import sleb
from pruning.types import Allocator, Method, Pattern, Pruner, Refiner
from pruning.weights import patterns, scores
from pruning.weights import sparsegpt as obs
from pruning.weights.dsnot import dsnot
from pruning.weights.per_linear import per_linear, scored
from pruning.weights.sparsellm import sparsellm


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


def multiflow() -> Method:
    """MULTIFLOW (Farina et al. 2024) as NeuroAL's authors use it: in each row, the weights that carry the least flow go."""

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(second_moment, scored(scores.multiflow, pattern.keep))

    return per_linear(pruner, patterns.per_row)


def sparsegpt(damp: float = 0.01) -> Method:
    """SparseGPT (Frantar & Alistarh 2023): weights go by their effect on the output, the others make it good, column after column.

    Args:
      damp: what is added to the diagonal of H, as a share of its mean; raised, and the report says so, where H does not factor.
    """
    if not damp >= 0:
        raise InputError(f"sparsegpt: damp={damp} must not be negative")
    return obs.reporting(
        per_linear(functools.partial(obs.pruner, damp), patterns.per_column_block(obs.COLUMNS)),
        damp,
    )


METHODS: dict[str, Callable[..., Method]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "multiflow": multiflow,
    "sparsegpt": sparsegpt,
    "sparsellm": sparsellm,
    "llmrank": llmrank,
    "flap": flap,
    "wanda_sp": wanda_sp,
    "magnitude_sp": magnitude_sp,
    "sleb": sleb,
}
ALLOCATIONS: dict[str, Callable[..., Allocator]] = {
    "uniform": lambda: uniform,
    "owl": owl,
    "alpha": alpha,
    "neuroal": neuroal,
}
REFINEMENTS: dict[str, Callable[..., Refiner | None]] = {"none": lambda: None, "dsnot": dsnot}
