"""Uniform width: how many channels, heads and neurons stay, and what norms make of fewer channels.

Source: Muralidharan et al. 2024 (arXiv 2407.14679), section 2. Runs on the host in NumPy.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import chex
import numpy as np

# Share of the neurons below which heads go instead.
LEAST_NEURONS = 0.25


class BlockSize(NamedTuple):
    """Units of a block, and what each holds.

    Attributes:
      heads: Head groups.
      neurons: Neurons, or neurons of each expert.
      head: Rows and columns of the stream's width that a head group holds.
      neuron: The same of a neuron, of one neuron of every expert together.
    """

    heads: int
    neurons: int
    head: int
    neuron: int


class Widths(NamedTuple):
    """Units that stay.

    Attributes:
      channels: Channels of the residual stream.
      heads: By block: head groups.
      neurons: By block: neurons.
    """

    channels: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def kept_count(share: float, count: int, multiple: int = 1) -> int:
    """Return how many of `count` units stay, at least one multiple and at most all.

    Args:
      share: Share that stays.
      count: Units.
      multiple: The number is a multiple of it, unless all stay.
    """
    if share >= 1:
        return count
    return min(count, max(1, round(share * count / multiple)) * multiple)


def parameters(widths: Widths, blocks: Sequence[BlockSize]) -> int:
    """Return the parameters of the blocks' linears.

    Args:
      widths: Units of the model.
      blocks: What units of each block hold.
    """
    rows = zip(widths.heads, widths.neurons, blocks, strict=True)
    return widths.channels * sum(h * b.head + f * b.neuron for h, f, b in rows)


def dense_widths(channels: int, blocks: Sequence[BlockSize]) -> Widths:
    """Return the widths of the dense model."""
    return Widths(channels, tuple(b.heads for b in blocks), tuple(b.neurons for b in blocks))


def neurons_for_budget(
    channels: int, heads: Sequence[int], blocks: Sequence[BlockSize], budget: float
) -> float:
    """Return the share of the neurons with which the blocks' linears hold `budget` parameters.

    Args:
      channels: Channels that stay.
      heads: By block: head groups that stay.
      blocks: What units of each block hold.
      budget: Parameters.
    """
    attention = sum(h * b.head for h, b in zip(heads, blocks, strict=True))
    return (budget / channels - attention) / sum(b.neurons * b.neuron for b in blocks)


def heads_for_budget(channels: int, blocks: Sequence[BlockSize], budget: float) -> tuple[int, ...]:
    """Return the head groups of every block that stay: all, unless too few neurons would.

    Every block gives up one group at a time until LEAST_NEURONS of the neurons meet the budget.

    Args:
      channels: Channels that stay.
      blocks: What units of each block hold.
      budget: Parameters of the blocks' linears.
    """
    heads = tuple(b.heads for b in blocks)
    for fewer in range(max(heads)):
        heads = tuple(max(1, b.heads - fewer) for b in blocks)
        if neurons_for_budget(channels, heads, blocks, budget) >= LEAST_NEURONS:
            break
    return heads


def channel_scores(by_tap: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of each channel of the stream, float64 [d].

    Args:
      by_tap: Of each norm's output: sums over windows of the squared mean of |x| over tokens [d].
    """
    return np.sum([np.sqrt(total.astype(np.float64)) for total in by_tap], axis=0)


def energy_of_norm(
    second: np.ndarray, mean: np.ndarray, gain: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Return the mean square of what a norm gives before its gain and bias, float64 [d].

    Args:
      second: Mean square of its output over tokens [d].
      mean: Mean of its output [d].
      gain: Its gain [d]; channels of gain 0 count as 0.
      bias: Its bias [d]; None without one.
    """
    chex.assert_equal_shape([second, mean, gain])
    second, mean, gain = (x.astype(np.float64) for x in (second, mean, gain))
    if bias is not None:
        b = bias.astype(np.float64)
        second = second - 2 * b * mean + b**2
    return np.where(gain == 0, 0.0, second / np.where(gain == 0, 1.0, gain) ** 2)


def norm_gain(energy: np.ndarray, keep: np.ndarray) -> float:
    """Return the factor with which a norm over fewer channels gives what it gave over all.

    A norm divides by the root of the mean square over its channels. Those that stay are the larger
    ones, so their mean square is larger, and all that is read behind the norm smaller.

    Args:
      energy: Share of each channel in the sum of squares, on any scale [d].
      keep: Channels that stay, bool [d].
    """
    chex.assert_equal_shape([energy, keep])
    total = energy.sum()
    if not total > 0:
        return 1.0
    share = float(energy[keep].sum() / total)
    return float(np.sqrt(share * len(keep) / keep.sum())) if share > 0 else 1.0


def removed_share(widths: Widths, dense: Widths, blocks: Sequence[BlockSize]) -> float:
    """Return the share of the parameters of the blocks' linears that is removed."""
    return 1 - parameters(widths, blocks) / parameters(dense, blocks)


def unit_scores(squared: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return scores from sums of squares, float64 [units] by group."""
    return {name: np.sqrt(total.astype(np.float64)) for name, total in squared.items()}
