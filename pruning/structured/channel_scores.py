"""Score heads and neurons by the channels that the linear behind them reads."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calibration.observers import Observer
from calibration.runtime import Runtime
from models.arch import Arch, Block, Model, linear_of
from models.sharding import to_host, tree_to_host
from pruning.structured.flap_core import Kept, Units
from pruning.structured.remove import GROUPS, Repair, calibrate_readers, cost
from pruning.structured.unit_scores import BlockUnits, block_units
from pruning.structured.widths import Part, Selection

# (W [out in] of a reader, statistics of its input) -> score of each channel [in]
ChannelScore = Callable[[jax.Array, Any], jax.Array]


def score_groups(
    arch: Arch, block: Block, stats: Mapping[str, Any], score: ChannelScore
) -> dict[str, np.ndarray]:
    """Return the score of every channel [in] that a group's reader reads, by group."""
    scores = {}
    for group in (g for kind in GROUPS for g in arch.groups_of(block, kind)):
        reader = group.reader.name
        # Selection runs on the host. Magnitude observes nothing, so its statistics are None.
        scores[group.name] = to_host(score(linear_of(block, reader).w, stats.get(arch.tap(reader))))
    return scores


def unit_cost(arch: Arch, block: Block, kind: str) -> float:
    """Return the parameters that a unit holds: of experts' neurons, one of each expert."""
    return sum(cost(block, group) for group in arch.groups_of(block, kind))


def by_reader(arch: Arch, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return scores by the reader of their group."""
    return {arch.group(name).reader.name: values for name, values in scores.items()}


@dataclasses.dataclass(frozen=True)
class DenseScores:
    """Scores from one pass over the dense model.

    Attributes:
      heads, neurons: By block: the units.
      by_reader: By block: reader -> scores of its channels.
      means: By block: tap -> mean of its channels, where there were statistics.
      head_width: Channels of a head.
      errors: By block: kind -> error of each unit after a refit, comparable between blocks; empty
        where it was not measured.
    """

    heads: list[BlockUnits]
    neurons: list[BlockUnits]
    by_reader: list[dict[str, np.ndarray]]
    means: list[dict[str, np.ndarray]]
    head_width: int
    errors: Sequence[Mapping[str, np.ndarray]] = ()

    def lists(self) -> tuple[Units, Units]:
        """Return heads and neurons as the lists that selection takes."""

        def units(blocks: Sequence[BlockUnits], kind: str, width: int) -> Units:
            errors = [of_block[kind] for of_block in self.errors] or None
            return Units([b.scores for b in blocks], width, [b.cost for b in blocks], errors)

        return units(self.heads, "heads", self.head_width), units(self.neurons, "neurons", 1)

    def selection(
        self,
        kept: Kept,
        repair: Repair,
        round_to: int,
        means: Sequence[Mapping[str, np.ndarray]] | None = None,
    ) -> Selection:
        """Return the choice as one whose blocks can be made wider or narrower.

        Args:
          kept: Units that stay.
          repair: Repair of the readers.
          round_to: As `BlockUnits.round_kept` has it.
          means: As `Selection` has it.
        """
        parts = [
            {
                "heads": Part(heads, kept.heads[k]),
                "neurons": Part(neurons, neurons.round_kept(kept.neurons[k], round_to)),
            }
            for k, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True))
        ]
        return Selection(parts, repair, round_to, means)


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
    arch = model.arch

    def visit(i: int, block: Block, stats: Mapping[str, Any]) -> tuple[Block, Any]:
        # On the host at once, so that the devices hold the statistics of one block only.
        means = {}
        if observer:
            means = {tap: tree_to_host(s).mean for tap, s in stats.items()}
        costs = [unit_cost(arch, block, kind) for kind in GROUPS]
        return block, (score_groups(arch, block, stats, score), means, costs)

    # Scores of different blocks compete, so all come from the dense model.
    records = calibrate_readers(model, tokens, runtime, visit, observer, "dense", name, key=key)
    heads, neurons = (
        [block_units(kind, scores, costs[k]) for scores, _, costs in records]
        for k, kind in enumerate(GROUPS)
    )
    return DenseScores(
        heads,
        neurons,
        [by_reader(arch, scores) for scores, _, _ in records],
        [mean for _, mean, _ in records],
        arch.group("heads").reader.width,
    )
