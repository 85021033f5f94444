"""Figures of allocations for the report."""

from collections.abc import Sequence

from pruning.figures import Figure, LineSeries, Table


def allocation_figures(
    sparsity: Sequence[float],
    target: float,
    cause: str = "",
    values: Sequence[float] | None = None,
    fraction: bool = False,
) -> tuple[Figure, ...]:
    """Return a plot and a table of the sparsity of each block.

    Args:
      sparsity: Fraction to remove of each block.
      target: Fraction to remove of the whole model.
      cause: Name of the quantity that the allocation follows; empty if there is none.
      values: That quantity by block.
      fraction: True if the quantity is a fraction.
    """
    line = LineSeries(
        title="Allocated sparsity of each block",
        x_label="block",
        y_label="sparsity",
        series={"sparsity": sparsity},
        caption="Dashed: the sparsity of the whole model.",
        level=target,
        fraction=True,
    )
    columns = ("block", "sparsity", cause) if cause else ("block", "sparsity")
    rows: list[list[str | float | None]] = [[str(i), s] for i, s in enumerate(sparsity)]
    if values is not None:
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    fractions = ("sparsity", cause) if fraction else ("sparsity",)
    return line, Table("Allocation", columns, rows, fractions)


def search_figure(
    step: str,
    lambdas: Sequence[float],
    scores: Sequence[float],
    best: float | None,
    symbol: str = "lambda",
) -> LineSeries:
    """Return a plot of the scores of a search over one parameter.

    Args:
      step: Name of the step, "block" or "row".
      lambdas: Values that were tried.
      scores: Score of each value; lower is better.
      best: The chosen value; None if there is none.
      symbol: Name of the parameter.
    """
    return LineSeries(
        title=f"Scores of {symbol}, {step} step",
        x_label=symbol,
        y_label="score",
        series={"score": scores},
        x=lambdas,
        caption="Each point is a trial on the search windows; lower is better. Orange: chosen.",
        marked={"score": [i for i, value in enumerate(lambdas) if value == best]},
    )
