"""DLP (Chen et al. 2025): blocks with lower scores at the median keep more."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from calibration.observers import SecondMoment, second_moment
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Arch, Block, Model, linear_of
from models.errors import InputError
from models.programs import program
from pruning.allocation.dlp_core import median, relative_importance
from pruning.allocation.figures import allocation_figures
from pruning.budget import all_shapes, block_sparsities, budget_of_blocks
from pruning.budget_core import fractions_from_scores
from pruning.types import Allocation, Layerwise, Request
from pruning.weights import scores


@program("median score", static=(0,))
def _block_median(arch: Arch, block: Block, stats: Mapping[str, SecondMoment]) -> jax.Array:
    """Return the median of all Wanda scores of a block, float32 []."""
    slots = arch.slots_of(block)
    return median([scores.wanda(linear_of(block, s.name).w, stats[s.reads]) for s in slots])


@dataclasses.dataclass(frozen=True)
class Dlp:
    """DLP (Chen et al. 2025): blocks whose median score is a larger share of all lose more.

    Args:
      alpha: Half of the span of the blocks' sparsities.
      variant: "official" clips fractions out of bounds to 0.01 and 0.99 and rounds each alone, as
        the authors' code does; "corrected", the default, meets the sparsity to one unit and is
        otherwise the same.
    """

    alpha: float = 0.15
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise InputError(f"dlp: alpha={self.alpha} must be at least 0 and less than 1")

    @property
    def reads_activations(self) -> bool:
        """Return that medians are those of scores with activations."""
        return True

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by medians, as `Allocator` says."""

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            return block, float(_block_median(model.arch, block, stats))

        medians = calibrate_blocks(
            model,
            tokens,
            runtime,
            visit,
            watch={s.reads: second_moment for s in model.arch.slots},
            # Of the dense model, as in the authors' code.
            propagate="dense",
            name="finding median scores",
            key=("medians",),  # neither alpha nor sparsity: trials of a sweep share the medians
        )
        importance = relative_importance(np.array(medians))
        fractions = fractions_from_scores(importance, request.sparsity, self.alpha)
        official = self.variant == "official"
        budget = budget_of_blocks(model, fractions, request.sparsity, official)
        means = block_sparsities(budget, all_shapes(model))
        return Allocation(
            budget,
            {"medians": medians, "block_sparsity": means},
            figures=allocation_figures(means, request.sparsity, "median score", medians),
        )
