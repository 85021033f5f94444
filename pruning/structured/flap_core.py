"""FLAP (An et al. 2024): fluctuation of channels, and the selection of units by it.

A unit is an attention head or a feed-forward neuron; with grouped-query attention a key-value head
and the query heads that share it are one unit. Its channels are the inputs of the linear that reads
it (`o`, `down`). Statistics run on the devices; selection runs on the host, as units are few.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from calibration.moments import Moments
from calibration.observers import Observer, SecondMoment, second_moment
from pruning.structured.select_core import (
    Keeps,
    clamp_to_band,
    drop_lowest,
    select_lowest_overall,
    split_like,
)

Metric = Literal["IFV", "WIFV", "WIFN"]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"]


class Fluctuation(NamedTuple):
    """Running statistics of the official code.

    Attributes:
      second: Second moment of every channel.
      mean: Mean over samples of the mean over tokens, float32 [c].
      fluctuation: Fluctuation of every channel, float32 [c].
    """

    second: SecondMoment
    mean: jax.Array
    fluctuation: jax.Array


def _start_fluctuation(channels: int) -> Fluctuation:
    """Return the statistics before the first sample."""
    return Fluctuation(second_moment.init(channels), jnp.zeros(channels), jnp.zeros(channels))


def _update_fluctuation(state: Fluctuation, x: jax.Array) -> Fluctuation:
    """Add samples x [b t c], one after the other.

    For sample n, from 0: F <- F (n-1)/n + sum_t (x - b)^2 / (n+1), and F = 0 for the first.
    """
    chex.assert_rank(x, 3)
    chex.assert_shape([state.mean, state.fluctuation], (x.shape[2],))
    x = x.astype(jnp.float32)

    def add(
        carry: tuple[jax.Array, jax.Array, jax.Array], sample: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        n, b, f = carry
        # The paper takes deviations from the mean before this sample. The official code overwrites
        # that mean before it reads it, so the sample is in it already.
        b = b * n / (n + 1) + jnp.mean(sample, axis=0) / (n + 1)
        squares = jnp.sum((sample - b[None, :]) ** 2, axis=0)
        # This weight and this divisor belong to different estimators, and the sum over tokens is no
        # mean. The result is no variance, but it is what the official code ranks by.
        new = f * (n - 1) / jnp.maximum(n, 1) + squares / (n + 1)
        return (n + 1, b, jnp.where(n == 0, 0.0, new)), None

    with jax.named_scope("fluctuation"):
        # Samples follow each other: every one changes the mean that the next is compared with.
        start = (state.second.samples, state.mean, state.fluctuation)
        (_, mean, fluctuation), _ = jax.lax.scan(add, start, x)
        return Fluctuation(second_moment.update(state.second, x), mean, fluctuation)


official_fluctuation = Observer(_start_fluctuation, _update_fluctuation)


def input_feature_metrics(w: jax.Array, stats: Fluctuation | Moments) -> dict[str, jax.Array]:
    """Score the inputs of a linear by every metric.

    Source: An et al. 2024, eq. 5 for WIFV.

    Args:
      w: Weights of the reader [out c].
      stats: Statistics of its input.

    Returns:
      Scores, float32 [c]: "IFV" the fluctuation; "WIFV" that times the squared norm of the column;
      "WIFN" the mean over outputs of |W| times the norm of the input.
    """
    chex.assert_rank(w, 2)
    chex.assert_shape(stats.second.total, (w.shape[1],))
    with jax.named_scope("channel_metrics"):
        w = w.astype(jnp.float32)
        f = stats.fluctuation if isinstance(stats, Fluctuation) else stats.variance
        edges = jnp.abs(w) * jnp.sqrt(stats.second.per_sample)[None, :]
        return {"IFV": f, "WIFV": f * jnp.sum(w**2, axis=0), "WIFN": jnp.mean(edges, axis=0)}


class Units(NamedTuple):
    """Units of one kind over all blocks.

    Attributes:
      metric: By block: scores of the channels [units * width].
      width: Channels of one unit.
      costs: By block: parameters that one unit holds.
      errors: By block: error of each unit after a refit, which compares blocks; None: standardised
        scores do.
    """

    metric: Sequence[np.ndarray]
    width: int
    costs: Sequence[float]
    errors: Sequence[np.ndarray] | None = None

    @property
    def total(self) -> float:
        """Return the parameters that all units hold."""
        counts = (len(m) // self.width for m in self.metric)
        return sum(n * cost for n, cost in zip(counts, self.costs, strict=True))

    def sums(self) -> list[np.ndarray]:
        """Return the sum of each unit's channel scores, float64 [units] by block."""
        return [self._by_unit(m.astype(np.float64)).sum(axis=1) for m in self.metric]

    def comparable(self) -> Sequence[np.ndarray]:
        """Return scores of units that can be compared between blocks, [units] by block."""
        return self.standardised_means() if self.errors is None else self.errors

    def standardised_means(self) -> list[np.ndarray]:
        """Return the mean of each unit's standardised channel scores, float64 [units] by block.

        Scores get mean 0 and deviation 1 within each block, so that blocks can be compared.
        """
        scores = []
        for m in self.metric:
            m = m.astype(np.float64)
            # torch.std, which the official code calls, divides by n - 1.
            deviation = m.std(ddof=1) if len(m) > 1 else 0.0
            # Equal scores order nothing: zeros instead of a division by zero.
            m = (m - m.mean()) / deviation if deviation > 0 else np.zeros_like(m)
            scores.append(self._by_unit(m).mean(axis=1))
        return scores

    def _by_unit(self, channels: np.ndarray) -> np.ndarray:
        """Return the channels of each unit in a row [units width]."""
        return channels.reshape(-1, self.width)


class Kept(NamedTuple):
    """Units that stay.

    Attributes:
      heads: By block: bool [heads], True stays.
      neurons: By block: bool [neurons], True stays.
    """

    heads: Keeps
    neurons: Keeps


def _count(scores: Sequence[np.ndarray]) -> int:
    """Return the number of units in all blocks."""
    return sum(len(s) for s in scores)


def _drop_lowest_overall(scores: Sequence[np.ndarray], count: int) -> Keeps:
    """Drop the lowest units of all blocks by number; a block may lose all."""
    return split_like(drop_lowest(np.concatenate(scores), count), scores)


def select_official(
    heads: Units, neurons: Units, ratio: float, structure: Structure, heads_removed: int
) -> Kept:
    """Select units with the counts of the official code.

    Args:
      heads: Attention heads.
      neurons: Feed-forward neurons.
      ratio: Fraction of the parameters to remove.
      structure: Comparison of units within or between blocks, as `Flap` has it.
      heads_removed: Heads of the whole model to remove, for the "MM" structures.

    Returns:
      The units that stay.
    """
    chex.assert_equal(len(heads.metric), len(neurons.metric))
    # The official code squares the metric of attention, and of attention only.
    squared = heads._replace(metric=[m.astype(np.float64) ** 2 for m in heads.metric])
    if structure == "UL-UM":
        h, n = squared.sums(), neurons.sums()
        return Kept(
            [drop_lowest(s, int(ratio * len(s))) for s in h],
            [drop_lowest(s, int(ratio * len(s))) for s in n],
        )
    if structure == "UL-MM":
        h, n = squared.sums(), neurons.sums()
        per_block = heads_removed // len(h)
        keep_neurons = []
        costs = zip(heads.costs, neurons.costs, strict=True)
        for block_heads, s, (head, neuron) in zip(h, n, costs, strict=True):
            total = len(block_heads) * head + len(s) * neuron
            # The heads alone may exceed the budget, hence the maximum with 0.
            count = int((ratio * total - head * per_block) / neuron)
            keep_neurons.append(drop_lowest(s, max(0, count)))
        return Kept([drop_lowest(s, per_block) for s in h], keep_neurons)
    h, n = squared.standardised_means(), neurons.standardised_means()
    if structure == "AL-MM":
        # The official code takes all blocks to be alike.
        head, neuron = heads.costs[0], neurons.costs[0]
        total = _count(h) * head + _count(n) * neuron
        count = int((ratio * total - head * heads_removed) / neuron)
        # Unlike `select_lowest_overall`, the official code may empty a block.
        return Kept(_drop_lowest_overall(h, heads_removed), _drop_lowest_overall(n, max(0, count)))
    return _select_official_by_threshold(h, n, ratio, int(heads.costs[0] / neurons.costs[0]))


def _select_official_by_threshold(
    heads: Sequence[np.ndarray], neurons: Sequence[np.ndarray], ratio: float, head_worth: int
) -> Kept:
    """Keep the units of one list that lie above its entry at the ratio, as the official code does.

    Args:
      heads: Scores of heads, by block.
      neurons: Scores of neurons, by block.
      ratio: Fraction to remove.
      head_worth: Neurons that a head is worth, truncated to a whole number.
    """
    flat = np.concatenate([*heads, *neurons])
    worth = np.ones(len(flat), np.int64)
    # Integers, as in the official code: `ones_like` of indices turns 512 / 3 into 170. With
    # 170.67 other neurons would stay.
    worth[: _count(heads)] = head_worth
    order = np.argsort(-flat, kind="stable")
    kept_worth = np.cumsum(worth[order])
    nearest = np.argmin(np.abs(kept_worth - kept_worth[-1] * (1 - ratio)))
    threshold = flat[order[nearest]]
    # The comparison is strict, so the unit at the threshold itself is removed too.
    return Kept([s > threshold for s in heads], [s > threshold for s in neurons])


def select_corrected(
    heads: Units,
    neurons: Units,
    ratio: float,
    structure: Structure,
    heads_removed: int,
    spread: float = 1.0,
) -> Kept:
    """Select units by the parameters that they hold; one unit of each kind stays in every block.

    Args:
      heads: Attention heads.
      neurons: Feed-forward neurons.
      ratio: Fraction of the parameters to remove.
      structure: "UL-UM" removes the same share of each kind in every block, "UL-MM" a number of
        heads and the rest neurons in every block, "AL-MM" the same over all blocks together,
        "AL-AM" the lowest units of the whole model.
      heads_removed: Heads of the whole model to remove, for the "MM" structures.
      spread: Largest difference between the fraction of its neurons that a block loses and the
        model's, for "AL-MM"; where errors compare blocks, one may lose less, down to nothing.

    Returns:
      The units that stay.
    """
    chex.assert_equal(len(heads.metric), len(neurons.metric))
    # Within a block, sums compare units; between blocks, errors or standardised scores.
    if structure == "UL-UM":
        return Kept(_drop_share(heads.sums(), ratio), _drop_share(neurons.sums(), ratio))
    if structure == "UL-MM":
        return _heads_then_neurons_per_block(heads, neurons, ratio, heads_removed)
    if structure == "AL-MM":
        return _heads_then_neurons_overall(heads, neurons, ratio, heads_removed, spread)
    scores = [*heads.comparable(), *neurons.comparable()]
    blocks = len(heads.metric)
    keeps = select_lowest_overall(scores, ratio, [*heads.costs, *neurons.costs])
    return Kept(keeps[:blocks], keeps[blocks:])


def _drop_share(scores: Sequence[np.ndarray], ratio: float) -> Keeps:
    """Drop the same share of every block's units, but never all of them."""
    return [drop_lowest(s, min(round(ratio * len(s)), len(s) - 1)) for s in scores]


def _heads_then_neurons_per_block(
    heads: Units, neurons: Units, ratio: float, heads_removed: int
) -> Kept:
    """Drop the same number of heads in every block, and neurons for the rest of its budget."""
    h, n = heads.sums(), neurons.sums()
    keep_heads = [drop_lowest(s, min(heads_removed // len(h), len(s) - 1)) for s in h]
    keep_neurons = []
    costs = zip(heads.costs, neurons.costs, strict=True)
    for keep, s, (head, neuron) in zip(keep_heads, n, costs, strict=True):
        budget = ratio * (len(keep) * head + len(s) * neuron)
        remaining = budget - (~keep).sum() * head
        # At least 0, as the heads may exceed the budget; and one neuron stays.
        count = min(max(0, round(remaining / neuron)), len(s) - 1)
        keep_neurons.append(drop_lowest(s, count))
    return Kept(keep_heads, keep_neurons)


def _heads_then_neurons_overall(
    heads: Units, neurons: Units, ratio: float, heads_removed: int, spread: float
) -> Kept:
    """Drop a number of the model's heads, and neurons of all blocks for the rest of the budget."""
    h, n = heads.comparable(), neurons.comparable()
    share = min(1.0, heads_removed / _count(h))
    keep_heads = select_lowest_overall(h, share, [1.0] * len(h))
    # Counted, not assumed: the best head of every block stays, so fewer may be removed than asked.
    removed = sum(
        int((~keep).sum()) * cost for keep, cost in zip(keep_heads, heads.costs, strict=True)
    )
    remaining = ratio * (heads.total + neurons.total) - removed
    share = min(1.0, max(0.0, remaining / neurons.total))
    # Relative costs: those of blocks alike are exactly 1, and counts decide.
    costs = [cost / neurons.costs[0] for cost in neurons.costs]
    # A block whose error no other makes up for may stay whole.
    limited = clamp_to_band(n, share, spread, both=neurons.errors is None)
    keep_neurons = select_lowest_overall(limited, share, costs)
    return Kept(keep_heads, keep_neurons)
