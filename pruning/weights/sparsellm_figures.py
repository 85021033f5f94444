"""Figure of SparseLLM's losses for the report."""

import math
from collections.abc import Sequence

from pruning.figures import Figure, LineSeries


def loss_figures(losses: Sequence[Sequence[float]]) -> tuple[Figure, ...]:
    """Return a plot of the loss of every block by iteration, if there are iterations.

    Args:
      losses: By block: loss before the first iteration and after each; empty for a block that was
        not pruned.
    """
    series: dict[str, list[float | None]] = {}
    for i, block_losses in enumerate(losses):
        if len(block_losses) > 1 and block_losses[0] > 0:
            # Blocks differ in scale, and share one axis this way.
            relative = [loss / block_losses[0] for loss in block_losses]
            # The report is JSON, which has no NaN: an iteration that overflowed leaves a gap.
            series[f"block {i}"] = [v if math.isfinite(v) else None for v in relative]
    if not series:
        return ()
    figure = LineSeries(
        title="Loss by iteration",
        x_label="iteration",
        y_label="loss / loss at iteration 0",
        series=series,
        caption="One line per block, later ones darker. Iteration 0 is SparseGPT's solution.",
        ordered=True,
    )
    return (figure,)
