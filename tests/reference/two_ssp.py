"""2SSP's scores and counts in NumPy, from arXiv 2501.17771 and what the authors' code computes."""

import numpy as np


def neuron_scores(windows: np.ndarray) -> np.ndarray:
    """Return the mean over windows of each neuron's L2 norm over tokens, x [windows tokens f]."""
    return np.linalg.norm(windows.astype(np.float64), axis=1).mean(axis=0)


def counts(
    blocks: int, attention: int, feed_forward: int, neurons: int, sparsity: float, alpha: float
) -> tuple[int, int]:
    """Return the attention parts that go and the neurons that stay in each block.

    Args:
      blocks: Number of blocks.
      attention: Parameters of one attention part.
      feed_forward: Parameters of one feed-forward part.
      neurons: Neurons of one.
      sparsity: Share of all these parameters to remove.
      alpha: Balance of the stages.
    """
    parts = round(blocks * sparsity ** (feed_forward / attention / alpha))
    total = round(sparsity * blocks * (attention + feed_forward))
    each = round((total - parts * attention) / blocks)
    return parts, round(neurons * (1 - each / feed_forward))
