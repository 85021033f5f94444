"""DLP (Chen et al. 2025), maths: the median of a block's scores."""

import math
from collections.abc import Sequence

import chex
import jax
import numpy as np

from pruning.weights.patterns_core import value_of_rank_in_all


def median(metrics: Sequence[jax.Array]) -> jax.Array:
    """Return the median of all scores of a block, the lower one of an even number.

    Source: Chen et al. 2025, section 3.2: the lower it is, the more a block matters.

    Args:
      metrics: Wanda's scores A of a block's linears, float32 [out in] each.

    Returns:
      The median, float32 [].
    """
    chex.assert_rank(metrics, 2)
    size = sum(math.prod(x.shape) for x in metrics)
    return value_of_rank_in_all(metrics, (size - 1) // 2)


def relative_importance(unimportance: np.ndarray) -> np.ndarray:
    """Return how much more each part matters than the others: 1 less its share of the sum.

    Source: Chen et al. 2025, section 3.2; LSA has it for its errors.

    Args:
      unimportance: Non-negative numbers, [n].

    Returns:
      Importance [n]; all 1 where the numbers are 0.
    """
    values = np.asarray(unimportance, np.float64)
    total = values.sum()
    return 1 - values / total if total > 0 else np.ones_like(values)
