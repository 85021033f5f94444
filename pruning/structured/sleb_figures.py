"""Figures of SLEB's search for the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from calibration.states import OFFLOADS
from pruning.figures import Figure, LineSeries, Table, kept_map
from pruning.structured.sleb_paths import Unit
from pruning.structured.sleb_runner import Runner
from pruning.structured.sleb_search import SearchResult
from pruning.structured.sleb_trials import Trial


def search_figures(
    losses: Sequence[Sequence[float | None]],
    removed: Sequence[int],
    parts: Sequence[tuple[int, str]] | None,
    together: int = 1,
) -> tuple[Figure, ...]:
    """Return a plot of the losses of every phase, and a map of the blocks kept.

    Args:
      losses: By phase: loss without each unit; None where it is unknown.
      removed: Removed units in order, one per phase, or all after a single phase.
      parts: Block and writer of each removed unit if units are halves of blocks, else None.
      together: Neighbours that each loss is without, from the unit on.
    """
    if not losses or not removed:
        return ()
    unit = "block" if parts is None else "sublayer"
    if parts is None:
        order = ", ".join(map(str, removed))
    else:
        order = ", ".join(f"{block} ({writer})" for block, writer in parts)
    by_phase = [removed[::together]] if len(losses) == 1 else [[u] for u in removed]
    lines = LineSeries(
        title=f"Loss without each {unit}" if together == 1 else f"Loss without {together} {unit}s",
        x_label=unit if together == 1 else f"first {unit}",
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


def merge_figures(cuts: Sequence[Mapping[str, Any]]) -> tuple[Figure, ...]:
    """Return a table of the blocks that were merged; nothing where none were.

    Args:
      cuts: Figures of each cut, as the report's details have them.
    """
    rows: list[list[str | float | None]] = []
    for cut in cuts:
        blocks = [cut["behind"], *cut.get("merged", ())]
        if len(blocks) < 2:
            continue
        parts = (", ".join(map(str, part)) for part in (blocks, cut["heads_from"]))
        neurons = ", ".join(map(str, cut["neurons_from"]))
        rows.append([*parts, neurons, *(round(error, 4) for error in cut["error"])])
    if not rows:
        return ()
    columns = ["blocks", "head groups of each", "neurons of each", "error, cut", "error, fitted"]
    caption = "Error: mean over tokens of |stream - dense stream|^2 / |dense stream|^2."
    return (Table("Merged blocks", columns, rows, caption=caption),)


def _by_unit(
    phases: Sequence[Mapping[int, Trial]],
    field: Literal["loss", "stopped_at"],
    units: int,
) -> list[list[float | None]]:
    """Return a figure of each unit's trial, by phase; None where a unit was not tried."""
    rows = []
    for trials in phases:
        rows.append([getattr(trials[u], field) if u in trials else None for u in range(units)])
    return rows


def search_details(
    runner: Runner | None, result: SearchResult, units: Sequence[Unit], halves: bool
) -> dict[str, Any]:
    """Return what the report says about a search.

    Args:
      runner: The search's; None without a search.
      result: Its result.
      units: All units.
      halves: Whether units are halves of blocks.
    """
    count = len(units)
    details = {
        "removal_order": result.removed,
        "losses": _by_unit(result.phases, "loss", count),
        "stopped_at": _by_unit(result.phases, "stopped_at", count),
        "influence": [result.influence.get(u) for u in range(count)],
        "block_evaluations": {
            "run": result.evaluations,
            "plain_search": result.plain_evaluations,
        },
    }
    if result.repaired:
        details["repaired_losses"] = [[by.get(u) for u in range(count)] for by in result.repaired]
    if result.divergences:
        details["divergences"] = [*result.divergences]
    if runner:
        details["cache"] = _cache(runner)
    if halves:
        removed = [units[u] for u in result.removed]
        details["removed_parts"] = [[unit.block, unit.writers[0]] for unit in removed]
    return details


def _cache(runner: Runner) -> dict[str, Any]:
    """Return the states that a search kept: every how many blocks, and the bytes by memory."""
    cache: dict[str, Any] = {
        "surviving_every": runner.shared.limits.every,
        "candidates_every": runner.own.limits.every,
        "blocks_held": runner.blocks_held,
    }
    for memory, shared, own in zip(OFFLOADS, runner.shared.most, runner.own.most, strict=True):
        cache[f"{memory}_bytes"] = shared + own
    return cache


def search_warnings(result: SearchResult) -> Iterator[str]:
    """Yield the candidates without a finite loss, and the zeros that stay in the file.

    Args:
      result: Result of the search.
    """
    for p, trials in enumerate(result.phases, start=1):
        lost = sorted(u for u, t in trials.items() if t.loss is None and t.stopped_at is None)
        if lost:
            names = ", ".join(map(str, lost))
            yield f"phase {p}: the loss without {names} is not finite, so it was not chosen"
    halves = sum(bool(piece.silent) for piece in result.path)
    if halves:
        yield f"{halves} blocks have one part zeroed in place: the file holds its zeros"
