"""FLAP (An et al. 2024), maths: how much each input channel of a linear fluctuates, which units go by it, and what makes up for them.

A unit is an attention head (with grouped-query attention a key-value head with the query heads that share it) or a feed-forward neuron;
its channels are the inputs of the linear that reads it (`o`, `down`). On the host but for the statistics; nothing here is large.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calibration.observers import Moments, Observer, SecondMoment, second_moment
from pruning.structured.select import Keeps, global_, lowest, within

Metric = Literal["IFV", "WIFV", "WIFN"]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"]


class Fluctuation(NamedTuple):
    """The released code's running statistics [c]: `mean` over samples of the mean over tokens, its `fluctuation`, and `second`."""

    second: SecondMoment
    mean: jax.Array
    fluctuation: jax.Array


def _fluctuation_update(state: Fluctuation, x: jax.Array) -> Fluctuation:
    """Sample n (from 0): F <- F (n-1)/n + sum_t (x - b)^2 / (n+1) with b the mean that has this sample in it already, F = 0 for the first.
    The paper's recursion has the mean before it there; the released code changes that one in place before it is read."""
    x = x.astype(jnp.float32)

    def add(
        carry: tuple[jax.Array, jax.Array, jax.Array], x: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        n, b, f = carry
        b = b * n / (n + 1) + jnp.mean(x, axis=0) / (n + 1)
        new = f * (n - 1) / jnp.maximum(n, 1) + jnp.sum((x - b[None, :]) ** 2, axis=0) / (n + 1)
        return (n + 1, b, jnp.where(n == 0, 0.0, new)), None

    (_, b, f), _ = jax.lax.scan(add, (state.second.samples, state.mean, state.fluctuation), x)
    return Fluctuation(second_moment.update(state.second, x), b, f)


official_fluctuation = Observer(
    lambda c: Fluctuation(second_moment.init(c), jnp.zeros(c), jnp.zeros(c)), _fluctuation_update
)


def input_feature_metrics(w: jax.Array, stats: Fluctuation | Moments) -> dict[str, jax.Array]:
    """Every metric of the inputs of W [out c], float32 [c]: IFV the fluctuation, WIFV it times the column's squared norm (eq. 5), WIFN the
    mean of |W| times the norm of the input."""
    w = w.astype(jnp.float32)
    f = stats.fluctuation if isinstance(stats, Fluctuation) else stats.variance
    edge = jnp.abs(w) * jnp.sqrt(stats.second.per_sample)[None, :]
    return {"IFV": f, "WIFV": f * jnp.sum(w**2, axis=0), "WIFN": jnp.mean(edge, axis=0)}


class Units(NamedTuple):
    """One kind of unit over all blocks. metric: of the channels, one [units * width] a block; width: channels of a unit; cost: parameters
    that one unit holds."""

    metric: Sequence[np.ndarray]
    width: int
    cost: float

    def each(self, reduce: Literal["sum", "mean"], standard: bool) -> list[np.ndarray]:
        """A score a unit [units] of every block: over its channels, which `standard` first gives mean 0 and deviation 1 in each block."""
        found = []
        for m in self.metric:
            m = m.astype(np.float64)
            if standard:
                spread = m.std(ddof=1) if len(m) > 1 else 0.0
                m = (m - m.mean()) / spread if spread > 0 else np.zeros_like(m)
            by_unit = m.reshape(-1, self.width)
            found.append(by_unit.sum(axis=1) if reduce == "sum" else by_unit.mean(axis=1))
        return found


class Kept(NamedTuple):
    """bool [units] a block, True stays."""

    heads: Keeps
    neurons: Keeps


def _lowest_of_all(scores: Sequence[np.ndarray], count: int) -> Keeps:
    """The `count` lowest of all blocks go; a block may lose all."""
    return np.split(lowest(np.concatenate(scores), count), np.cumsum([len(s) for s in scores])[:-1])


def select_official(
    heads: Units, neurons: Units, ratio: float, structure: Structure, heads_removed: int
) -> Kept:
    """What stays by the released code's counts. It squares the metric of attention, truncates a head's worth in neurons to a whole number,
    and leaves out, of all units in one list, the one whose place is nearest to the ratio."""
    blocks = len(heads.metric)
    squared = heads._replace(metric=[m.astype(np.float64) ** 2 for m in heads.metric])
    if structure in ("UL-UM", "UL-MM"):
        h, n = squared.each("sum", False), neurons.each("sum", False)
        per_block = heads_removed // blocks
        if structure == "UL-UM":
            return Kept(
                [lowest(s, int(ratio * len(s))) for s in h],
                [lowest(s, int(ratio * len(s))) for s in n],
            )
        total = len(h[0]) * heads.cost + len(n[0]) * neurons.cost
        count = int((ratio * total - heads.cost * per_block) / neurons.cost)
        return Kept([lowest(s, per_block) for s in h], [lowest(s, max(0, count)) for s in n])
    h, n = squared.each("mean", True), neurons.each("mean", True)
    if structure == "AL-MM":
        total = sum(len(s) for s in h) * heads.cost + sum(len(s) for s in n) * neurons.cost
        count = int((ratio * total - heads.cost * heads_removed) / neurons.cost)
        return Kept(_lowest_of_all(h, heads_removed), _lowest_of_all(n, max(0, count)))
    flat = np.concatenate([*h, *n])
    worth = np.ones(len(flat), np.int64)
    worth[: sum(len(s) for s in h)] = int(heads.cost / neurons.cost)
    order = np.argsort(-flat, kind="stable")
    done = np.cumsum(worth[order])
    threshold = flat[order[np.argmin(np.abs(done - done[-1] * (1 - ratio)))]]
    return Kept([s > threshold for s in h], [s > threshold for s in n])


def select_corrected(
    heads: Units,
    neurons: Units,
    ratio: float,
    structure: Structure,
    heads_removed: int,
    spread: float = 1.0,
) -> Kept:
    """What stays by parameters removed: of each kind and block alike (UL-UM), a number of heads and the rest neurons in each block
    (UL-MM) or of all blocks (AL-MM), or whatever scores lowest in all the model (AL-AM). One unit of each kind stays in each block.

    Args:
      spread: by how much the fraction of its neurons that a block loses may differ from the model's, in AL-MM.
    """
    if structure == "UL-UM":
        return Kept(
            *(
                [lowest(s, min(round(ratio * len(s)), len(s) - 1)) for s in u.each("sum", False)]
                for u in (heads, neurons)
            )
        )
    blocks = len(heads.metric)
    if structure == "UL-MM":
        h, n = heads.each("sum", False), neurons.each("sum", False)
        keep_heads = [lowest(s, min(heads_removed // blocks, len(s) - 1)) for s in h]
        kept = []
        for k, s in zip(keep_heads, n, strict=True):
            left = ratio * (len(k) * heads.cost + len(s) * neurons.cost) - (~k).sum() * heads.cost
            kept.append(lowest(s, min(max(0, round(left / neurons.cost)), len(s) - 1)))
        return Kept(keep_heads, kept)
    h, n = heads.each("mean", True), neurons.each("mean", True)
    if structure == "AL-AM":
        keeps = global_([*h, *n], ratio, [heads.cost] * blocks + [neurons.cost] * blocks)
        return Kept(keeps[:blocks], keeps[blocks:])
    all_heads, all_neurons = (sum(map(len, s)) for s in (h, n))
    keep_heads = global_(h, min(1.0, heads_removed / all_heads), [1.0] * blocks)
    gone = sum(int((~k).sum()) for k in keep_heads)
    left = ratio * (all_heads * heads.cost + all_neurons * neurons.cost) - gone * heads.cost
    share = min(1.0, max(0.0, left / (all_neurons * neurons.cost)))
    return Kept(keep_heads, global_(within(n, share, spread), share, [1.0] * blocks))
