"""ATP (Huang et al. 2025): sparsities grow evenly from block to block, by one searched step."""

import dataclasses
import math
from typing import Literal

import numpy as np

from calibration.runtime import Runtime
from models.arch import Model
from models.errors import InputError
from pruning.allocation.figures import allocation_figures, search_figure
from pruning.allocation.neuroal_core import schedule
from pruning.allocation.neuroal_trials import Search, loss_trials, run_trials
from pruning.budget import all_shapes, block_sparsities, budget_of_blocks
from pruning.types import Allocation, Budget, Layerwise, Request

OFFICIAL_STEP = 0.002  # between values of beta in the paper's grid


def most(blocks: int, sparsity: float) -> float:
    """Return the greatest difference of neighbouring blocks that keeps all within 0 and 1.

    Source: Huang et al. 2025, section 3.4: min(2S, 2 (1 - S)) / (L - 1).

    Args:
      blocks: Number of blocks L.
      sparsity: Their mean S.
    """
    return 2 * min(sparsity, 1 - sparsity) / max(blocks - 1, 1)


def progression(blocks: int, sparsity: float, beta: float) -> np.ndarray:
    """Return the arithmetic progression S - beta (L - 1) / 2 + beta (i - 1), [blocks].

    Source: Huang et al. 2025, eq. 10.

    Args:
      blocks: Number of blocks L.
      sparsity: Mean of the progression S.
      beta: Difference between one block and the next.
    """
    return schedule(blocks, sparsity, beta * (blocks - 1) / 2)


@dataclasses.dataclass(frozen=True)
class Atp:
    """ATP (Huang et al. 2025): each block loses more than the one before it, by the same step.

    Args:
      beta: Difference between the sparsities of neighbouring blocks; None: searched.
      trials: Values of beta to try besides 0, evenly up to the greatest that keeps every block
        within 0 and 1.
      samples: Calibration windows that values are tried on, the first of them.
      variant: "official" tries every 0.002, as the paper does, without 0, and rounds each block
        alone; "corrected", the default, tries as many values on a model of any depth, and meets
        the sparsity to one unit. Both choose by the loss on calibration windows.
    """

    beta: float | None = None
    trials: int = 9
    samples: int = 8
    variant: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if self.beta is not None and not abs(self.beta) < 1:  # so that NaN is refused too
            raise InputError(f"atp: beta={self.beta} must be above -1 and below 1")
        if self.trials < 1 or self.samples < 1:
            raise InputError(
                f"atp: trials={self.trials} and samples={self.samples} must be at least 1"
            )

    @property
    def reads_activations(self) -> bool:
        """Return whether values of beta are tried on the windows."""
        return self.beta is None

    def _grid(self, blocks: int, sparsity: float) -> list[float]:
        """Return the values of beta to try."""
        limit = most(blocks, sparsity)
        if self.variant == "official":
            count = max(1, math.floor(limit / OFFICIAL_STEP + 1e-9))
            return [round((k + 1) * OFFICIAL_STEP, 6) for k in range(count)]
        return [limit * k / self.trials for k in range(self.trials + 1)]

    def _budget(self, model: Model, sparsity: float, beta: float) -> Budget:
        """Return the budget of a value of beta."""
        fractions = progression(len(model.blocks), sparsity, beta)
        return budget_of_blocks(model, fractions, sparsity, self.variant == "official")

    def __call__(
        self,
        model: Model,
        tokens: np.ndarray,
        request: Request,
        runtime: Runtime,
        layerwise: Layerwise,
    ) -> Allocation:
        """Allocate by a progression, as `Allocator` says."""
        shapes, sparsity = all_shapes(model), request.sparsity
        betas: list[float] = []
        losses: list[float] = []
        beta = self.beta
        if beta is None:
            betas = self._grid(len(model.blocks), sparsity)
            budgets = [self._budget(model, sparsity, b) for b in betas]
            search = Search(model, tokens[: self.samples], request, runtime, layerwise, shapes, [])
            losses = run_trials(loss_trials, search, budgets, "trying progressions").scores
            beta = betas[int(np.argmin(losses))]
        budget = self._budget(model, sparsity, beta)
        means = block_sparsities(budget, shapes)
        figures = [*allocation_figures(means, sparsity)]
        if betas:
            figures.append(search_figure("block", betas, losses, beta, symbol="beta"))
        return Allocation(
            budget,
            {"beta": beta, "betas": betas, "losses": losses, "block_sparsity": means},
            figures=tuple(figures),
        )
