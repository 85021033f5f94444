"""Name and format the measures of agreement with the dense model, for every table alike."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """A measure of quality on a data set.

    Attributes:
      key: Name in the report's `agreement`, or "perplexity".
      label: Name in a table of one run.
      heading: Name of a column.
      form: Format of a value.
      unit: Unit, in words.
      less: True if a lower value is better.
      best: Value of the dense model itself; None if it is not the same for all runs.
    """

    key: str
    label: str
    heading: str
    form: str
    unit: str
    less: bool
    best: float | None

    @property
    def axis(self) -> str:
        """Return the name of a plot's axis, with the unit."""
        return f"{self.heading} ({self.unit})" if self.unit else self.heading

    def text(self, value: float | None, error: float | None = None) -> str:
        """Format a value, with its standard error where it is known; a dash if there is none."""
        if value is None:
            return "—"
        return self.form.format(value) + ("" if error is None else f" ± {self.form.format(error)}")

    def of(self, report: Mapping[str, Any], data: str) -> float | None:
        """Return the pruned model's value on a data set; None if it was not measured."""
        if self is PERPLEXITY:
            return report["perplexity"].get(data, {}).get("pruned")
        return _figures(report, data).get(self.key)

    def of_dense(self, report: Mapping[str, Any], data: str) -> float | None:
        """Return the dense model's value on a data set; None if nothing was measured."""
        if self is PERPLEXITY:
            return report["perplexity"].get(data, {}).get("dense")
        figures = _figures(report, data)
        if self.key not in figures:
            return None
        return figures[f"{self.key}_most"] if self.best is None else self.best


PERPLEXITY = Measure("perplexity", "perplexity", "perplexity", "{:.3f}", "", True, None)
KL = Measure("kl", "KL from the dense model", "KL", "{:.4f}", "nats per token", less=True, best=0.0)
TOP1 = Measure(
    "top1", "same top token", "same top token", "{:.2%}", "share of positions", False, 1.0
)
GREEDY = Measure(
    "greedy", "same greedy tokens", "same greedy tokens", "{:.1f}", "tokens", False, None
)
AGREEMENT = (KL, TOP1, GREEDY)
MEASURES = {m.key: m for m in (PERPLEXITY, *AGREEMENT)}


def _figures(report: Mapping[str, Any], data: str) -> Mapping[str, Any]:
    # Older reports have none.
    return report.get("agreement", {}).get(data, {})


def rows(report: Mapping[str, Any], data: str) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value ± standard error, unit) of each measure that a report has.

    Args:
      report: Content of pruning_report.json.
      data: Name of the data set.
    """
    figures, draws = _figures(report, data), report.get("spread", {}).get("agreement", {})
    for m in AGREEMENT:
        if m.key not in figures:
            continue
        unit = m.unit if m.best is not None else f"of {figures[f'{m.key}_most']} tokens"
        yield f"… {m.label}", m.text(figures[m.key], figures[f"{m.key}_stderr"]), unit
        if spread := draws.get(data, {}).get(m.key):
            span = f"{m.text(spread['min'])} to {m.text(spread['max'])}"
            yield "… over calibration draws", m.text(spread["mean"], spread["std"]), span


def brief(report: Mapping[str, Any], data: str) -> str:
    """Return the measures of a data set in a few words; empty if a report has none.

    Args:
      report: Content of pruning_report.json.
      data: Name of the data set.
    """
    values = ((m, m.of(report, data)) for m in (KL, TOP1))
    return "; ".join(f"{m.heading} {m.text(value)}" for m, value in values if value is not None)
