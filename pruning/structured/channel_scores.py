"""Score heads and neurons by the channels that the linear behind them reads."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calibration.observers import Observer
from calibration.runtime import Runtime
from models.arch import Block, Model
from models.sharding import to_host, tree_to_host
from pruning.structured.flap_core import Kept, Units
from pruning.structured.remove import GROUPS, Keep, calibrate_readers, cost
from pruning.structured.select_core import round_kept

# (W [out in] of a reader, statistics of its input) -> score of each channel [in]
ChannelScore = Callable[[jax.Array, Any], jax.Array]


def score_readers(
    model: Model, block: Block, stats: Mapping[str, Any], score: ChannelScore
) -> dict[str, np.ndarray]:
    """Return the score of every channel [in], by reader of a group."""
    readers = [model.arch.group(name).reader.name for name in GROUPS]
    return {
        # Selection runs on the host. Magnitude observes nothing, so its statistics are None.
        reader: to_host(score(getattr(block, reader).w, stats.get(model.arch.tap(reader))))
        for reader in readers
    }


@dataclasses.dataclass(frozen=True)
class DenseScores:
    """Scores from one pass over the dense model.

    Attributes:
      heads, neurons: Units with the scores of their channels.
      by_reader: By block: reader -> scores of its channels.
      means: By block: tap -> mean of its channels, where there were statistics.
    """

    heads: Units
    neurons: Units
    by_reader: list[dict[str, np.ndarray]]
    means: list[dict[str, np.ndarray]]


def score_dense(
    model: Model,
    tokens: np.ndarray,
    runtime: Runtime,
    observer: Observer | None,
    score: ChannelScore,
    name: str,
    key: Hashable,
) -> DenseScores:
    """Score every unit in one pass over the dense model."""
    groups = [model.arch.group(group) for group in GROUPS]

    def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
        # On the host at once, so that the devices hold the statistics of one block only.
        means = {}
        if observer:
            means = {tap: tree_to_host(s).mean for tap, s in stats.items()}
        costs = [cost(block, g) for g in groups]  # of a unit: the same in every block
        return block, (score_readers(model, block, stats, score), means, costs)

    # Scores of different blocks compete, so all come from the dense model.
    records = calibrate_readers(model, tokens, runtime, visit, observer, "dense", name, key=key)
    by_reader = [scores for scores, _, _ in records]
    means = [mean for _, mean, _ in records]
    costs = records[0][2]
    heads, neurons = (
        Units([scores[g.reader.name] for scores in by_reader], g.reader.width, unit_cost)
        for g, unit_cost in zip(groups, costs, strict=True)
    )
    return DenseScores(heads, neurons, by_reader, means)


def round_neurons(kept: Kept, neurons: Sequence[np.ndarray], round_to: int) -> list[Keep]:
    """Return the choice by block and group, with the numbers of neurons rounded."""
    rounded_neurons = round_kept(neurons, kept.neurons, round_to)
    return [
        {"heads": heads, "neurons": stays}
        for heads, stays in zip(kept.heads, rounded_neurons, strict=True)
    ]
