"""Plot sparsity and scores by block, one panel per kind of linear."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from launch.report import summary
from launch.report.svg import BLUE, INK, ORANGE, TEAL, block_axis, finite, render, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

V = TypeVar("V")
_SAME = 0.005  # kinds whose sparsities differ less than this in every block share a panel
_EXPERTS = "experts."
_EXPERT = re.compile(r"experts\.\d+\.")
_LOG_RANGE = 100  # a larger ratio of scores takes a log axis


def block_and_kind(name: str) -> tuple[int, str] | None:
    """Split `model.layers.3.mlp.up_proj` into (3, "mlp.up_proj").

    Args:
      name: A linear's name in the checkpoint.

    Returns:
      Block index and kind of linear; None for a linear outside the blocks.
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else None


def sparsity_by_block(reached: Mapping[str, float], target: Mapping[str, float]) -> str:
    """Draw bars of the sparsity of each block, with a tick at its target.

    Args:
      reached: Fraction removed by name of linear.
      target: Fraction to remove by name of linear; linears without a budget are absent.

    Returns:
      SVG text, or "" without a block. Kinds of linear with equal profiles share a panel.
    """
    reached_of, target_of = _by_kind(reached), _by_kind(target)

    def same(a: str, b: str) -> bool:
        close = _close(reached_of[a], reached_of[b])
        return close and _close(target_of.get(a, {}), target_of.get(b, {}))

    panels = _panels(reached_of, same)
    if not panels:
        return ""
    top = max([*finite(reached.values()), *finite(target.values()), 0.0])

    def draw(axes: Sequence["Axes"]) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            bars, ticks = reached_of[panel[0]], target_of.get(panel[0], {})
            left, right = [i - 0.48 for i in ticks], [i + 0.48 for i in ticks]
            ax.bar(list(bars), list(bars.values()), width=0.8, color=_colour(panel))
            ax.hlines(list(ticks.values()), left, right, colors=INK, linewidth=1.6)
            ax.set_ylim(0.0, 1.12 * top if top else 1.0)
            ax.locator_params(axis="y", nbins=4)
            ax.yaxis.set_major_formatter(lambda value, _: summary.percent(value))
            _title(ax, panel)
            values = [fraction for kind in panel for fraction in reached_of[kind].values()]
            ax.set_title(summary.percent_span(values), loc="right")
        block_axis(axes, {i for profile in reached_of.values() for i in profile})

    return render("Sparsity per block", len(panels), 1.15, draw)


def scores_by_block(quantiles: Mapping[str, Sequence[float]], label: str) -> str:
    """Draw a box of the scores of each block, one panel per kind of linear.

    The axis is logarithmic if the positive scores span more than a factor of 100; a whisker from
    zero then begins at the edge. Blocks with a non-finite score are left out.

    Args:
      quantiles: [min, q25, median, q75, max] of the scores by name of linear.
      label: Name of the score.

    Returns:
      SVG text, or "" without a box. Kinds with equal quantiles share a panel, such as the
      matrices of a group of neurons.
    """
    kinds: dict[str, dict[int, Sequence[float]]] = {}
    for kind, by_block in _by_kind(quantiles).items():
        boxes = {i: q for i, q in by_block.items() if len(finite(q)) == 5}
        if boxes:
            kinds[kind] = boxes
    panels = _panels(kinds, lambda a, b: kinds[a] == kinds[b])
    if not panels:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            _boxes(ax, kinds[panel[0]], _colour(panel))
            _title(ax, panel)
        block_axis(axes, {i for boxes in kinds.values() for i in boxes})

    return render(f"Scores per block: {label}", len(panels), 1.5 if len(panels) > 1 else 2.5, draw)


def _by_kind(per_linear: Mapping[str, V]) -> dict[str, dict[int, V]]:
    """Group values by kind of linear, then by block; of experts the mean of a block's."""
    kinds: dict[str, dict[int, V]] = {}
    of_experts: dict[tuple[str, int], list[V]] = {}
    for name, value in per_linear.items():
        place = block_and_kind(name)
        if not place or value is None:
            continue
        block, kind = place
        shared = _EXPERT.sub("experts.", kind)
        kinds.setdefault(shared, {})[block] = value
        if shared != kind:
            of_experts.setdefault((shared, block), []).append(value)
    for (shared, block), values in of_experts.items():
        mean: Any = np.mean(np.asarray(values), axis=0).tolist()
        kinds[shared][block] = mean
    return kinds


def _panels(kinds: Iterable[str], same: Callable[[str, str], bool]) -> list[list[str]]:
    """Group the kinds, in order, with the first panel whose first kind is the same."""
    panels: list[list[str]] = []
    for kind in kinds:
        panel = next((panel for panel in panels if same(panel[0], kind)), None)
        if panel is None:
            panels.append([kind])
        else:
            panel.append(kind)
    return panels


def _close(a: Mapping[int, float], b: Mapping[int, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[i] - b[i]) <= _SAME for i in a)


def _colour(kinds: Sequence[str]) -> str:
    attention = {"attn" in kind for kind in kinds}
    if len(attention) == 2:
        return TEAL
    return BLUE if attention == {True} else ORANGE


def _title(ax: "Axes", kinds: Sequence[str]) -> None:
    names = [kind.rpartition(".")[2] for kind in kinds]
    mean = ["mean of experts"] if any(_EXPERTS in kind for kind in kinds) else []
    ax.set_title(textwrap.fill(", ".join(names + mean), 40))


def _boxes(ax: "Axes", boxes: Mapping[int, Sequence[float]], colour: str) -> None:
    blocks = list(boxes)
    left, right = [i - 0.35 for i in blocks], [i + 0.35 for i in blocks]
    low, q25, median, q75, high = (list(column) for column in zip(*boxes.values(), strict=True))
    positive = [v for quantiles in boxes.values() for v in quantiles if v > 0]
    if positive and min(low) >= 0 and max(high) > _LOG_RANGE * min(positive):
        ax.set_yscale("log")
        ax.set_ylim(min(positive) / 1.5, max(high) * 1.5)
        # A log axis has no zero: draw it below the edge, where it is clipped.
        floor = min(positive) / 10
        low, q25, median, q75 = ([max(v, floor) for v in q] for q in (low, q25, median, q75))
        ax.minorticks_off()
    heights = [b - a for a, b in zip(q25, q75, strict=True)]
    ax.yaxis.set_major_formatter(lambda value, _: tick(value))
    ax.vlines(blocks, low, high, colors=INK, alpha=0.55, linewidth=1.0)
    ax.bar(blocks, heights, bottom=q25, width=0.7, color=colour)
    ax.hlines(median, left, right, colors=INK, linewidth=1.6)
