"""Tables of the methods, allocations and refinements, by the names that users write."""

from collections.abc import Callable
from typing import Literal

from calibration.observers import second_moment
from models.errors import InputError
from pruning.allocation.alpha import Alpha
from pruning.allocation.atp import Atp
from pruning.allocation.dlp import Dlp
from pruning.allocation.evopress import EvoPress
from pruning.allocation.lsa import Lsa
from pruning.allocation.neuroal import NeuroAL
from pruning.allocation.owl import Owl
from pruning.budget import Uniform
from pruning.structured.channel_methods import magnitude_sp, wanda_sp
from pruning.structured.flap import Flap
from pruning.structured.llmrank import LLMRank
from pruning.structured.minitron import Minitron
from pruning.structured.reap import Reap
from pruning.structured.sleb import Sleb
from pruning.structured.two_ssp import TwoSSP
from pruning.types import Allocator, Method, Pattern, Pruner, Refiner
from pruning.weights import patterns, scores
from pruning.weights.admm import Admm
from pruning.weights.dsnot import DSnoT
from pruning.weights.per_linear import PerLinear
from pruning.weights.score_solver import score_solver
from pruning.weights.sparsegpt import sparsegpt
from pruning.weights.sparsellm import SparseLLM


def magnitude(scope: Literal["matrix", "row"] = "matrix") -> PerLinear:
    """Magnitude pruning: remove the smallest |W|; reads no calibration data.

    Args:
      scope: "matrix": one threshold for a whole matrix, as in Wanda's repository; "row": the
        smallest of each row, as in NeuroAL's.
    """

    def pruner(pattern: Pattern) -> Pruner:
        # No observer, so that no forward runs at all.
        return Pruner(None, score_solver(scores.magnitude, pattern.keep))

    # Wanda's repository also removes the entry at the threshold and its ties: 0.5001 for 0.5 on
    # weights from float16. So do we, unless the ties are many.
    return PerLinear(pruner, patterns.per_matrix if scope == "matrix" else patterns.per_row)


def wanda() -> PerLinear:
    """Wanda (Sun et al. 2024): remove the smallest |W| times the input channel's norm in each row.

    The weights that stay are not changed.
    """

    def pruner(pattern: Pattern) -> Pruner:
        # `score_solver` is cached, so all calls give equal pruners and one compilation.
        return Pruner(second_moment, score_solver(scores.wanda, pattern.keep))

    return PerLinear(pruner, patterns.per_row)


def multiflow() -> PerLinear:
    """MULTIFLOW (Farina et al. 2024): remove the weights that carry the least flow in each row.

    The rows are ranked on their own, as NeuroAL's authors do.
    """

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(second_moment, score_solver(scores.multiflow, pattern.keep))

    return PerLinear(pruner, patterns.per_row)


def ria(power: float = 0.5, scope: Literal["matrix", "row"] = "matrix") -> PerLinear:
    """RIA (Zhang et al. 2024): remove weights that are small among those of their row and column.

    Sizes count relative to the sums of their row and their column, times a power of the input
    channel's norm. The weights that stay are not changed.

    Args:
      power: Power of the norm of the input channel; 0 leaves activations out, 1 is Wanda's.
      scope: "matrix": one threshold for a whole matrix, as in the authors' code; "row": the lowest
        of each row.
    """
    if not power >= 0:  # so that NaN is refused too
        raise InputError(f"ria: power={power} must not be negative")
    prepare = scores.norm_power(float(power))

    def pruner(pattern: Pattern) -> Pruner:
        return Pruner(second_moment, score_solver(scores.ria, pattern.keep), prepare)

    return PerLinear(pruner, patterns.per_matrix if scope == "matrix" else patterns.per_row)


METHODS: dict[str, Callable[..., Method]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "multiflow": multiflow,
    "ria": ria,
    "sparsegpt": sparsegpt,
    "sparsellm": SparseLLM,
    "admm": Admm,
    "llmrank": LLMRank,
    "flap": Flap,
    "wanda_sp": wanda_sp,
    "magnitude_sp": magnitude_sp,
    "sleb": Sleb,
    "reap": Reap,
    "minitron": Minitron,
    "two_ssp": TwoSSP,
}
ALLOCATIONS: dict[str, Callable[..., Allocator]] = {
    "uniform": Uniform,
    "owl": Owl,
    "alpha": Alpha,
    "neuroal": NeuroAL,
    "dlp": Dlp,
    "lsa": Lsa,
    "atp": Atp,
    "evopress": EvoPress,
}
REFINEMENTS: dict[str, Callable[..., Refiner | None]] = {"none": lambda: None, "dsnot": DSnoT}
