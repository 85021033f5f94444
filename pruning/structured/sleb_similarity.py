"""Search for the blocks whose inputs are most alike, as FlattenGPT chooses what it merges."""

import itertools
from collections.abc import Mapping

import numpy as np

from calibration.runtime import Runtime
from models.errors import InputError
from pruning.structured.sleb_paths import Unit, whole_path
from pruning.structured.sleb_runner import Runner
from pruning.structured.sleb_search import SearchResult, without, writers_of


def similar_blocks(
    cosines: Mapping[tuple[int, int], float], depth: int, allowed: Mapping[int, Unit], n: int
) -> list[int]:
    """Return n blocks whose input is most like that of the block they would be merged into.

    Source: Xu et al. 2026 (FlattenGPT). A block that follows a merged one is compared with the
    input of the latter, not with that of the block merged last.

    Args:
      cosines: Mean cosine of the inputs of two blocks.
      depth: Number of blocks.
      allowed: Blocks that may go.
      n: Number of blocks.

    Returns:
      The blocks in the order of their choice.
    """
    left, chosen = list(range(depth)), []
    for _ in range(n):
        pairs = [p for p in itertools.pairwise(left) if p[1] in allowed]
        # The earliest of equal ones.
        best = max(pairs, key=lambda pair: cosines[pair])
        left.remove(best[1])
        chosen.append(best[1])
    return chosen


def search_by_similarity(
    runner: Runner, units: Mapping[int, Unit], n: int, runtime: Runtime
) -> SearchResult:
    """Remove the n blocks whose input is most like that of the block they are merged into.

    Args:
      runner: Runs the dense model.
      units: Blocks that may go, by index.
      n: Number of blocks to remove.
      runtime: Progress and journal.

    Raises:
      InputError: The model's states are not finite.
    """

    def compute() -> list[list[float]]:
        batches = len(runner.windows)
        advance = runtime.progress("comparing inputs", batches, unit="batches")
        by_batch = []
        for m in range(batches):
            by_batch.append(runner.cosines(m, n))
            advance()
        # Weighted, as the last micro-batch may be smaller.
        return [
            [*pair, float(np.average([x[pair] for x in by_batch], weights=runner.windows))]
            for pair in by_batch[0]
        ]

    found = runtime.step(compute, ("cosines", runner.digest, n))
    cosines = {(int(i), int(j)): value for i, j, value in found}
    if not np.isfinite(list(cosines.values())).all():
        raise InputError(
            "the inputs of some blocks are not finite",
            "try `dtype`=float32 or other calibration data",
        )
    removed = similar_blocks(cosines, runner.depth, units, n)
    path = without(whole_path(runner.depth), [units[u] for u in removed], writers_of(runner.arch))
    # Of a block as it stands before anything is merged.
    influence = {j: 1 - value for (i, j), value in cosines.items() if j == i + 1}
    return SearchResult(path, removed, [], influence, [runner.evaluations], [runner.evaluations])
