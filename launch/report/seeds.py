"""Mean and spread of a quantity over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation is 0 for one seed."""

    mean: float
    std: float


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and sample standard deviation of one value per seed."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), deviation)
