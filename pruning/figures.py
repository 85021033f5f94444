"""Figures that a method adds to the report: lines, maps of kept units, tables.

A method describes a figure as data and the report draws it, so the report knows no method and a
method knows no plotting library.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Most cells of a row in a KeptMap, so that a report stays small for wide models.
MAX_CELLS = 256


class LineSeries(NamedTuple):
    """Lines over a common x axis.

    Attributes:
      title: Title of the figure.
      x_label: Name of the x axis.
      y_label: Name of the y axis.
      series: Values by name of line, one per x; None where a value is unknown.
      x: Positions of the values; None for 0, 1, 2, ….
      caption: How to read the figure.
      marked: By name of line, the indices of the values to highlight.
      level: Height of a dashed reference line, if any.
      fraction: True if values are fractions, to be shown in percent.
      ordered: True if the lines follow one another in time; later ones are drawn darker.
      cut_peaks: True to end the y axis below extreme values, so that they do not hide the rest.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[float | None]]
    x: Sequence[float] | None = None
    caption: str = ""
    marked: Mapping[str, Sequence[int]] = {}
    level: float | None = None
    fraction: bool = False
    ordered: bool = False
    cut_peaks: bool = False


class KeptMap(NamedTuple):
    """Map of the units that each block kept.

    Attributes:
      title: Title of the figure.
      unit: Name of a unit in the plural, such as "heads".
      units: Number of units in the widest block of the model that came in.
      kept: One row per block: fraction of the units kept in each cell. A cell is one unit, or
        several neighbours if there are more than MAX_CELLS units; None behind the last unit of a
        narrower block.
      caption: How to read the figure.
    """

    title: str
    unit: str
    units: int
    kept: Sequence[Sequence[float | None]]
    caption: str = ""


class Table(NamedTuple):
    """Table of texts and numbers.

    Attributes:
      title: Title of the table.
      columns: Headings; the first column names the row.
      rows: Cells of each row; None for an empty cell.
      fractions: Headings of the columns that hold fractions, to be shown in percent.
      caption: How to read the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    fractions: Sequence[str] = ()
    caption: str = ""


Figure = LineSeries | KeptMap | Table

KINDS: Mapping[str, type[LineSeries] | type[KeptMap] | type[Table]] = {
    "line_series": LineSeries,
    "kept_map": KeptMap,
    "table": Table,
}


def to_json(figure: Figure) -> dict[str, Any]:
    """Return a figure's fields for a JSON file, with its `kind`."""
    kind = next(name for name, of_kind in KINDS.items() if isinstance(figure, of_kind))
    return {"kind": kind, **figure._asdict()}


def from_json(fields: Mapping[str, Any]) -> Figure:
    """Return the figure that `to_json` wrote.

    Args:
      fields: The figure's fields and its `kind`.
    """
    return KINDS[fields["kind"]](**{key: v for key, v in fields.items() if key != "kind"})


def kept_map(unit: str, masks: Sequence[np.ndarray]) -> KeptMap:
    """Return the map of the units that each block kept.

    Args:
      unit: Name of a unit in the plural, such as "heads".
      masks: One keep mask per block, bool [units of the block], True where the unit stays.
    """
    widest = max(map(len, masks))
    edges = np.linspace(0, widest, min(widest, MAX_CELLS) + 1).astype(int)

    def share(mask: np.ndarray, start: int, end: int) -> float | None:
        return round(float(mask[start:end].mean()), 6) if start < len(mask) else None

    left, total = sum(int(mask.sum()) for mask in masks), sum(map(len, masks))
    caption = f"Coloured: kept; empty: removed. {left:,} of {total:,} {unit} are left."
    if any(len(mask) < widest for mask in masks):
        caption += " Grey: not in the model that came in, whose blocks differ in width."
    return KeptMap(
        title=f"Kept {unit}",
        unit=unit,
        units=widest,
        kept=[[share(mask, *cell) for cell in itertools.pairwise(edges)] for mask in masks],
        caption=caption,
    )
