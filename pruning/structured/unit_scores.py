"""Units of a block as selection sees them: neurons of experts are ranked within each expert.

Stock configurations hold one width for all experts of a block. So the r-th unit of a block with
experts is the r-th best neuron of every expert, and a choice of units removes as many from each.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pruning.structured.remove import Keep
from pruning.structured.select_core import round_kept

# torch's grouped products take experts whose rows are a multiple of 16 bytes.
EXPERT_MULTIPLE = 8


class BlockUnits(NamedTuple):
    """Units of one kind in a block.

    Attributes:
      scores: Scores of the units' channels [units * width]; of ranked neurons the mean over
        experts.
      cost: Parameters that a unit holds, in all experts together.
      orders: Group -> its units from the best to the worst, int [units]; None in the one group of a
        block without experts, whose units are as they are.
    """

    scores: np.ndarray
    cost: float
    orders: Mapping[str, np.ndarray | None]

    @property
    def ranked(self) -> bool:
        """Return True for neurons of experts."""
        return any(order is not None for order in self.orders.values())

    def keep(self, stays: np.ndarray) -> Keep:
        """Return the units that stay of each group.

        Args:
          stays: Units that stay, bool [units].
        """
        kept = {}
        for group, order in self.orders.items():
            kept[group] = stays
            if order is not None:
                kept[group] = np.zeros_like(stays)
                kept[group][order] = stays
        return kept

    def round_kept(self, stays: np.ndarray, round_to: int) -> np.ndarray:
        """Return the units that stay, bool [units], with their number rounded.

        Args:
          stays: Units that stay, bool [units].
          round_to: Keep a multiple of this many; 0: as many as asked, of experts' neurons a
            multiple of EXPERT_MULTIPLE.
        """
        multiple = round_to or (EXPERT_MULTIPLE if self.ranked else 0)
        return round_kept([self.scores], [stays], multiple)[0]


def block_units(kind: str, scores: Mapping[str, np.ndarray], costs: float) -> BlockUnits:
    """Return the units of a kind in a block.

    Args:
      kind: "heads" or "neurons".
      scores: Group -> scores of its channels, for the groups of the block, of all kinds.
      costs: Parameters that one unit of each group of the kind holds, together.
    """
    if kind in scores:
        return BlockUnits(scores[kind], costs, {kind: None})
    of_experts = {name: s for name, s in scores.items() if name.endswith(f".{kind}")}
    # Stable, so that ties fall alike on every machine.
    orders = {name: np.argsort(-s, kind="stable") for name, s in of_experts.items()}
    ranked = [of_experts[name][order] for name, order in orders.items()]
    return BlockUnits(np.mean(ranked, axis=0), costs, orders)
