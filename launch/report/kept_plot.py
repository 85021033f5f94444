"""The report's pictures of what a method of whole units kept: heads, neurons, blocks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.report.plots import BLUE, INK, ORANGE, TEAL, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 256  # most columns of a picture: of more units, a column is several, paler where fewer of them are left
COLOURS = {"heads": BLUE, "neurons": ORANGE, "blocks": TEAL}


def shares(kept: Sequence[Sequence[int]], units: int) -> np.ndarray:
    """What is left in each cell of the picture, float64 [blocks, at most COLUMNS], from the indices that each block kept of its units."""
    mask = np.zeros((len(kept), units))
    for row, indices in zip(mask, kept, strict=True):
        row[list(indices)] = 1.0
    edges = np.linspace(0, units, min(units, COLUMNS) + 1).astype(int)[:-1]
    return np.add.reduceat(mask, edges, axis=1) / np.diff([*edges, units])


def kept_units(what: str, kept: Sequence[Sequence[int]], units: int) -> str:
    """A row for each block, its units from left to right, those that were kept coloured. Returns SVG text, or "" without units."""
    if not kept or not units:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        from matplotlib.colors import to_rgb
        from matplotlib.ticker import MaxNLocator

        (ax,) = axes
        share = shares(kept, units)
        colour = np.broadcast_to(to_rgb(COLOURS[what]), (*share.shape, 3))
        ax.imshow(
            np.concatenate([colour, share[..., None]], axis=2),
            aspect="auto",
            interpolation="none",
            extent=(-0.5, units - 0.5, len(kept) - 0.5, -0.5),
        )
        ax.hlines(
            np.arange(1, len(kept)) - 0.5, -0.5, units - 0.5, colors=INK, linewidth=0.3, alpha=0.4
        )
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.spines[["top", "right"]].set_visible(True)
        ax.set_xlabel(what.removesuffix("s"))
        if len(kept) > 1:
            ax.set_ylabel("block")
        else:
            ax.set_yticks([])

    return render(f"Kept {what}", 1, min(0.5 + 0.16 * len(kept), 4.0), draw)


def pictures(details: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, in words how much is left, the picture) for each kind of unit that a report's `details` tell of."""
    found = []
    for what, units in (details.get("units") or {}).items():
        kept = details.get(f"kept_{what}") or []
        said = f"{sum(map(len, kept)):,} of {units * len(kept):,} are left"
        found.append((what, said, kept_units(what, kept, units)))
    removed, losses = details.get("removal_order"), details.get("losses")
    if removed and losses and not details.get("removed_parts"):
        blocks = len(losses[0])
        kept = [i for i in range(blocks) if i not in removed]
        found.append(
            ("blocks", f"{len(kept)} of {blocks} are left", kept_units("blocks", [kept], blocks))
        )
    return found
