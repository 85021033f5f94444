"""Perplexity as SparseGPT, Wanda, FLAP and SLEB report it.

Windows are cut from one stream, without BOS, and the incomplete tail is dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from eval.forward import last_states
from models.arch import Model, cross_entropy
from models.progress import Progress, no_progress
from models.sharding import place, to_host


class Perplexity(NamedTuple):
    """Perplexity of a model over token windows.

    Attributes:
      value: exp of the mean over windows of each window's mean cross-entropy.
      cross_entropy: Mean cross-entropy of each window in nats, float64 [windows].
      tokens: Number of predicted positions, windows * (length - 1).
    """

    value: float
    cross_entropy: np.ndarray
    tokens: int

    @property
    def error(self) -> float | None:
        """Return the standard error of the value over windows, to first order.

        It is the value times the standard error of the mean cross-entropy; None for one window or
        where it is not finite.
        """
        if len(self.cross_entropy) < 2 or not np.all(np.isfinite(self.cross_entropy)):
            return None
        deviation = float(np.std(self.cross_entropy, ddof=1))
        error = self.value * deviation / len(self.cross_entropy) ** 0.5
        return error if np.isfinite(error) else None


def perplexity(
    model: Model,
    windows: np.ndarray,
    *,
    batch: int = 8,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
    name: str = "evaluating",
    visit: Callable[[jax.Array], None] | None = None,
) -> Perplexity:
    """Compute the perplexity of a model over token windows.

    Args:
      model: Model, whose blocks are read as `eval.forward.last_states` does.
      windows: Token ids, int [windows length], length at least 2.
      batch: Windows in one micro-batch.
      mesh: Mesh, windows are split over its `data` axis; None for one device.
      progress: Shows the progress.
      name: What it says.
      visit: Called with the hidden states after the last block, [b t d], of each micro-batch in
        order, to measure more in the same pass; None for nothing more.

    Returns:
      Perplexity, inf or nan where the model's own output is.
    """
    non_block = place(model.non_block, mesh)
    batches = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    # The head is as much work as so many blocks: it has vocab * d weights, a block about 12 * d^2.
    vocab, d = non_block.embed.shape
    head_blocks = max(1, round(vocab / (12 * d)))
    steps = windows.size * (len(model.blocks) + head_blocks)
    advance = progress(name, steps, tokens=windows.size)
    per_batch = []
    for t, x in last_states(model, non_block, batches, mesh, advance):
        # float64 from here on: the mean over many windows must not depend on their order.
        per_batch.append(to_host(cross_entropy(model.arch, non_block, x, t)).astype(np.float64))
        if visit is not None:
            visit(x)
        advance(t.size * head_blocks)
    ce = np.concatenate(per_batch)
    with np.errstate(over="ignore"):
        value = float(np.exp(np.mean(ce)))
    return Perplexity(value, ce, ce.size * (windows.shape[1] - 1))
