"""OWL (Yin et al. 2024): blocks with more outliers keep more."""

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
from pruning.allocation.figures import allocation_figures
from pruning.allocation.owl_core import outlier_share
from pruning.budget import all_shapes, block_sparsities, budget_of_blocks
from pruning.budget_core import fractions_from_scores
from pruning.types import Allocation, Layerwise, Request
from pruning.weights import scores


@program("outliers counted", static=(0,))
def _block_outliers(
    arch: Arch, block: Block, stats: Mapping[str, SecondMoment], m: float
) -> jax.Array:
    """Return the share of outliers among all Wanda scores of a block, float32 []."""
    # One mean for the whole block: the official code concatenates the scores of its linears.
    slots = arch.slots_of(block)
    metrics = [scores.wanda(linear_of(block, s.name).w, stats[s.reads]) for s in slots]
    return outlier_share(metrics, m)


@dataclasses.dataclass(frozen=True)
class Owl:
    """OWL (Yin et al. 2024): blocks with more outliers, entries far above the mean, lose less.

    Args:
      m: An entry of |W| |x| is an outlier above m times its block's mean.
      lam: Blocks lose from about sparsity - lam to sparsity + lam.
      variant: "official" rounds and clips (0.01 and 0.99 for what is out of bounds) as the
        authors' code does; "corrected", the default, meets the sparsity to one unit and is
        otherwise the same.
    """

    m: float = 5  # an int in the official code
    lam: float = 0.08
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if not (self.m > 0 and 0 <= self.lam < 1):
            raise InputError(
                f"owl: m={self.m} must be positive, lam={self.lam} at least 0 and less than 1"
            )

    @property
    def reads_activations(self) -> bool:
        """Return that outliers are scores with activations."""
        return True

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by outliers, as `Allocator` says."""

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            return block, float(_block_outliers(model.arch, block, stats, float(self.m)))

        shares = calibrate_blocks(
            model,
            tokens,
            runtime,
            visit,
            watch={s.reads: second_moment for s in model.arch.slots},
            # Shares are those of the dense model, as in the official code.
            propagate="dense",
            name="counting outliers",
            # Neither lam nor sparsity: trials of a sweep share the counts.
            key=("outliers", self.m),
        )
        # Scaled by the extremes: one block with far more outliers makes all others nearly alike.
        fractions = fractions_from_scores(np.array(shares), request.sparsity, self.lam)
        official = self.variant == "official"
        budget = budget_of_blocks(model, fractions, request.sparsity, official)
        means = block_sparsities(budget, all_shapes(model))
        return Allocation(
            budget,
            {"outliers": shares, "block_sparsity": means},
            figures=allocation_figures(means, request.sparsity, "outliers", shares, fraction=True),
        )
