"""Figures of SLEB's search for the report."""

from collections.abc import Sequence

import numpy as np

from pruning.figures import Figure, LineSeries, kept_map


def search_figures(
    losses: Sequence[Sequence[float | None]],
    removed: Sequence[int],
    parts: Sequence[tuple[int, str]] | None,
) -> tuple[Figure, ...]:
    """Return a plot of the losses of every phase, and a map of the blocks kept.

    Args:
      losses: By phase: loss without each unit; None where it is unknown.
      removed: Removed units in order, one per phase, or all after a single phase.
      parts: Block and writer of each removed unit if units are halves of blocks, else None.
    """
    if not losses or not removed:
        return ()
    unit = "block" if parts is None else "sublayer"
    if parts is None:
        order = ", ".join(map(str, removed))
    else:
        order = ", ".join(f"{block} ({writer})" for block, writer in parts)
    by_phase = [removed] if len(losses) == 1 else [[u] for u in removed]
    lines = LineSeries(
        title=f"Loss without each {unit}",
        x_label=unit,
        y_label="loss",
        series={f"phase {p}": phase for p, phase in enumerate(losses, start=1)},
        caption=(
            f"One line per phase, later ones darker. Orange: removed, in this order: {order}. "
            "A point is missing where the search stopped before its whole loss was known."
        ),
        marked={f"phase {p}": chosen for p, chosen in enumerate(by_phase, start=1)},
        ordered=True,
        cut_peaks=True,
    )
    if parts is not None:
        return (lines,)
    return lines, kept_map("blocks", [~np.isin(np.arange(len(losses[0])), removed)])
