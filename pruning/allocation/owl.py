"""OWL (Yin et al. 2024): blocks with more outliers keep more."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from calibration.observers import SecondMoment, second_moment
from calibration.passes import calibrate_blocks
from calibration.runtime import Runtime
from models.arch import Arch, Block, Model
from models.errors import InputError
from models.programs import program
from pruning.allocation.figures import allocation_figures
from pruning.allocation.owl_core import outliers
from pruning.budget import all_shapes, block_means, by_block, exact, spread, within
from pruning.types import Allocation, Allocator, Layerwise, Request
from pruning.weights import scores


@program("outliers counted", static=(0,))
def _of_block(arch: Arch, block: Block, stats: Mapping[str, SecondMoment], m: float) -> jax.Array:
    return outliers([scores.wanda(getattr(block, s.name).w, stats[s.reads]) for s in arch.slots], m)


def owl(
    m: float = 5, lam: float = 0.08, variant: Literal["corrected", "official"] = "corrected"
) -> Allocator:
    """OWL (Yin et al. 2024): the block with most outliers, entries of |W| |x| far above their mean, loses least.

    Args:
      m: an entry is an outlier above m times its block's mean.
      lam: blocks lose from about sparsity - lam to sparsity + lam.
      variant: "official" rounds and clips (0.01 and 0.99 for what is out of bounds) as the released code does; "corrected", the
        default, meets the sparsity to one unit and is otherwise the same.
    """
    if not (m > 0 and 0 <= lam < 1):
        raise InputError(f"owl: m={m} must be positive, lam={lam} at least 0 and less than 1")

    def allocate(
        model: Model, tokens: np.ndarray, request: Request, runtime: Runtime, layerwise: Layerwise
    ) -> Allocation:
        shapes = all_shapes(model)

        def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
            return block, float(_of_block(model.arch, block, stats, m))

        watch = {s.reads: second_moment for s in model.arch.slots}
        shares = calibrate_blocks(
            model,
            tokens,
            runtime,
            visit,
            watch=watch,
            propagate="dense",
            name="counting outliers",
            key=("outliers", m),
        )
        asked = spread(np.array(shares), request.sparsity, lam)
        official = variant == "official"
        budget = (
            by_block(model, within(asked))
            if official
            else exact(by_block(model, asked), shapes, request.sparsity)
        )
        means = block_means(budget, shapes)
        return Allocation(
            budget,
            {"outliers": shares, "block_sparsity": means},
            figures=allocation_figures(means, request.sparsity, "outliers", shares, fraction=True),
        )

    return allocate
