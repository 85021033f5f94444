"""Perplexity as SparseGPT, Wanda, FLAP and SLEB report it: windows of one stream, no BOS added, the incomplete tail dropped."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from eval.forward import last_states
from models.arch import Model, cross_entropy
from models.sharding import place, to_host


class Perplexity(NamedTuple):
    """`value` = exp(mean over windows of the window's mean cross-entropy); `cross_entropy` in nats, float64 [windows]."""

    value: float
    cross_entropy: np.ndarray
    tokens: int  # predicted positions: windows * (length - 1)

    @property
    def error(self) -> float | None:
        """Standard error of the value over windows, to first order: value * that of the mean cross-entropy. None for one window, or where
        it is not finite."""
        if len(self.cross_entropy) < 2 or not np.all(np.isfinite(self.cross_entropy)):
            return None
        error = (
            self.value * float(np.std(self.cross_entropy, ddof=1)) / len(self.cross_entropy) ** 0.5
        )
        return error if np.isfinite(error) else None


def perplexity(
    model: Model, windows: np.ndarray, *, batch: int = 8, mesh: Mesh | None = None
) -> Perplexity:
    """Perplexity of a model over token windows.

    Args:
      model: its blocks are read as `eval.forward.last_states` says.
      windows: int [windows length], length at least 2.
      batch: windows in one micro-batch.
      mesh: windows are split over its `data` axis.
    Returns a Perplexity; its value is inf or nan when the model's own output is.
    """
    non_block = place(model.non_block, mesh)
    batches = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    found = [
        to_host(cross_entropy(model.arch, non_block, x, t)).astype(np.float64)
        for t, x in last_states(model, non_block, batches, mesh)
    ]
    ce = np.concatenate(found)
    with np.errstate(over="ignore"):
        value = float(np.exp(np.mean(ce)))
    return Perplexity(value, ce, ce.size * (windows.shape[1] - 1))
