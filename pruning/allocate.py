"""Allocators: from one sparsity for the model to a budget for every linear."""

import numpy as np

from models.arch import Model
from pruning.types import Budget


def uniform(model: Model, sparsity: float) -> Budget:
    """The same fraction of every prunable linear."""
    return tuple({slot.name: np.asarray(sparsity, np.float64) for slot in model.arch.slots} for _ in range(len(model.blocks)))
