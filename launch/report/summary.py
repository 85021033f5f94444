"""Format the numbers of a report, for the terminal and the HTML page alike."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from launch.report import measures, targets

ABSENT = "—"
_STAGES = {
    "load": "load",
    "calibrate_and_prune": "calibrate and prune",
    "draws": "further draws",
    "recover": "recover",
    "eval": "evaluate",
    "export": "export",
}


class Row(NamedTuple):
    """One line of the summary table, as text.

    Attributes:
      label: Name of the quantity.
      dense: Its value for the dense model.
      pruned: Its value for the pruned model.
      change: The change from dense to pruned, or a remark.
    """

    label: str
    dense: str
    pruned: str
    change: str


def perplexity(value: float | None) -> str:
    """Format a perplexity with about four digits.

    Args:
      value: The perplexity; None if it was not measured, infinite or NaN for a collapsed model.
    """
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    if abs(value) >= 1e3:
        return f"{value:,.1f}"
    return f"{value:.3f}"


def percent(fraction: float | None) -> str:
    """Format a fraction (0.2997) as a percentage (29.97%) without trailing zeros."""
    if fraction is None:
        return ABSENT
    if not math.isfinite(fraction):
        return str(float(fraction))
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def percent_span(fractions: Iterable[float]) -> str:
    """Format the smallest and the largest of some fractions: `20% to 39%`, or one if equal."""
    values = list(fractions)
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


def count(number: int | None) -> str:
    """Format an exact count with thousands separators."""
    return ABSENT if number is None else f"{number:,}"


def size(byte_count: int | None) -> str:
    """Format bytes in the binary unit that keeps the number below 1024."""
    if byte_count is None:
        return ABSENT
    if byte_count < 1024:
        return f"{byte_count} B"
    power = min((int(byte_count).bit_length() - 1) // 10, 4)
    return f"{byte_count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def duration(seconds: float | None) -> str:
    """Format seconds for a reader: 0.42 s, 12.3 s, 4 min 05 s, 2 h 05 min, 3.3 days."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / (24 * 60):,.1f} days"


def ratio(dense: float | None, pruned: float | None) -> str:
    """Format `pruned / dense` as 1.148x, or a dash if the quotient is undefined."""
    if not dense or pruned is None or not math.isfinite(dense) or not math.isfinite(pruned):
        return ABSENT
    value = pruned / dense
    if value >= 1e4:
        return f"{value:.2e}x"
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3f}x"


def difference(dense: float | None, pruned: float | None) -> str:
    """Format the relative change of a count as -19.97%, or `unchanged`."""
    if not dense or pruned is None:
        return ABSENT
    if dense == pruned:
        return "unchanged"
    return f"{100 * (pruned / dense - 1):+.2f}%"


def shorten(name: str, width: int = 24) -> str:
    """Cut a long name to its last `width` characters, at a slash where there is one."""
    if len(name) <= width:
        return name
    end = name[1 - width :]
    return "…" + end[max(end.find("/"), 0) :]


def last_component(path: str) -> str:
    """Return what stands behind the last slash of a path or a hub id: `SmolLM2-135M`."""
    return path.rstrip("/").rpartition("/")[2] or path


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Map each path to its file name, with as many folders as tell it from the others.

    Args:
      names: Data sets or checkpoints as the user gave them, names or paths.
    """
    parts = {name: name.rstrip("/").split("/") for name in names}
    most = max(map(len, parts.values()), default=0)
    labels: dict[str, str] = {}
    for name, own in parts.items():
        for length in range(1, most + 1):
            label = "/".join(own[-length:]) or name
            others = ("/".join(p[-length:]) for other, p in parts.items() if other != name)
            if label not in others:
                break
        labels[name] = label
    return labels


def target(report: Mapping[str, Any]) -> str:
    """Return `target 30%` or `target params=100M`, or nothing if the run had no target."""
    if "target" in report:
        return f"target {report['target']['target']}"
    sparsity = report.get("sparsity", {})
    return "" if sparsity.get("target") is None else f"target {percent(sparsity['target'])}"


def protocol_note(report: Mapping[str, Any]) -> str:
    """Return the name of the run's protocol and the flags that override it, if it has one."""
    protocol = report.get("protocol", {})
    if "name" not in protocol:
        return ""
    overridden = protocol.get("overridden", {})
    changed = ", ".join(f"--{flag}={value}" for flag, value in overridden.items())
    return f"protocol {protocol['name']}" + (f", but {changed}" if changed else "")


class DrawSpread(NamedTuple):
    """Perplexity over several calibration draws, as text.

    Attributes:
      mean: Mean ± sample standard deviation.
      span: Smallest to largest.
    """

    mean: str
    span: str


def draw_spread(report: Mapping[str, Any], data: str) -> DrawSpread | None:
    """Return the spread of a data set's perplexity over calibration draws; None for one draw."""
    spread = report.get("spread", {}).get("perplexity", {}).get(data)
    if not spread:
        return None
    mean = measured((spread["mean"], spread["std"]), fraction=False)
    return DrawSpread(mean, f"{perplexity(spread['min'])} to {perplexity(spread['max'])}")


class Metric(NamedTuple):
    """A metric of a zero-shot task.

    Attributes:
      task: Name of the task.
      name: Name of the metric, such as `acc,none`.
      dense: Value and standard error (None if unknown) of the dense model; None if not measured.
      pruned: The same for the pruned model.
    """

    task: str
    name: str
    dense: tuple[float, float | None] | None
    pruned: tuple[float, float | None] | None

    @property
    def fraction(self) -> bool:
        """Return True if the metric is a fraction of the documents."""
        name = self.name.partition(",")[0]
        return name.startswith(("acc", "exact_match")) or name.endswith("_acc")

    def of(self, model: str) -> tuple[float, float | None] | None:
        """Return the value of the "dense" or the "pruned" model."""
        return self.dense if model == "dense" else self.pruned


def metrics(tasks: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    """List every metric of a report's `tasks`.

    Args:
      tasks: {task: {"dense": {metric: value, metric_stderr: error}, "pruned": …}}.
    """

    def read(values: Mapping[str, Any], metric: str) -> tuple[float, float | None] | None:
        name, comma, filter_name = metric.partition(",")
        value = values.get(metric)
        if value is None:
            return None
        return value, values.get(f"{name}_stderr{comma}{filter_name}")

    rows = []
    for task, models in tasks.items():
        dense, pruned = models.get("dense", {}), models.get("pruned", {})
        for metric in dense:
            if not metric.partition(",")[0].endswith("_stderr"):
                rows.append(Metric(task, metric, read(dense, metric), read(pruned, metric)))
    return rows


def measured(value: tuple[float, float | None] | None, fraction: bool) -> str:
    """Format a value with its standard error: 42.50% ± 3.50%, or 12.310 ± 0.421.

    Args:
      value: Value and error (None if unknown); None if it was not measured.
      fraction: True to show a percentage, with two decimals so that columns align.
    """
    if value is None:
        return ABSENT
    text = "{:.2%}".format if fraction else perplexity
    return text(value[0]) + ("" if value[1] is None else f" ± {text(value[1])}")


def task_rows(
    tasks: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """Return a row for each metric, and one below it for its spread over calibration draws.

    Args:
      tasks: The report's `tasks`.
      spread: {task: {metric: {"mean", "std", "min", "max"}}} over draws; None for one draw.

    Returns:
      The rows. Changes of accuracies are in percentage points, of other metrics a ratio.
    """
    rows = []
    for m in metrics(tasks):
        change = ABSENT
        if m.dense and m.pruned and m.fraction:
            change = f"{100 * (m.pruned[0] - m.dense[0]):+.2f} points"
        elif m.dense and m.pruned:
            change = ratio(m.dense[0], m.pruned[0])
        dense, pruned = measured(m.dense, m.fraction), measured(m.pruned, m.fraction)
        rows.append(Row(f"{m.task}, {m.name}", dense, pruned, change))
        if draws := (spread or {}).get(m.task, {}).get(m.name):
            text = percent if m.fraction else perplexity
            mean = measured((draws["mean"], draws["std"]), m.fraction)
            span = f"{text(draws['min'])} to {text(draws['max'])}"
            rows.append(Row("… over calibration draws", "", mean, span))
    return rows


def _perplexity_rows(report: Mapping[str, Any]) -> list[Row]:
    def with_error(scores: Mapping[str, Any], model: str) -> str:
        value = scores.get(model)
        pair = None if value is None else (value, scores.get(f"{model}_stderr"))
        return measured(pair, fraction=False)

    rows, data_sets = [], report.get("perplexity", {})
    labels = short_names(data_sets)
    for name, scores in data_sets.items():
        dense, pruned = with_error(scores, "dense"), with_error(scores, "pruned")
        change = ratio(scores.get("dense"), scores.get("pruned"))
        rows.append(Row(f"Perplexity, {labels[name]}", dense, pruned, change))
        if spread := draw_spread(report, name):
            label = f"… over {len(report['draws'])} calibration draws"
            rows.append(Row(label, "", spread.mean, spread.span))
        for label, value, unit in measures.rows(report, name):
            rows.append(Row(label, "", value, unit))
    return rows


def quality_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return the summary's rows: quality by data set and task, sparsity, size and speed.

    Args:
      report: Content of pruning_report.json; every key may be missing.
    """
    rows = _perplexity_rows(report)
    if "target" in report:
        rows.append(Row(*targets.summary_row(report["target"])))
    rows += task_rows(report.get("tasks", {}), report.get("spread", {}).get("tasks", {}))
    sparsity = report.get("sparsity", {})
    rows.append(Row("Sparsity, prunable", "", percent(sparsity.get("prunable")), target(report)))
    rows.append(Row("Sparsity, whole model", "", percent(sparsity.get("total")), ""))
    for label, key, text in (
        ("Parameters", "parameters", count),
        ("Weights on disk", "bytes", size),
    ):
        numbers = report.get(key, {})
        dense, pruned = numbers.get("dense"), numbers.get("pruned")
        rows.append(Row(label, text(dense), text(pruned), difference(dense, pruned)))
    return rows + _speed_rows(report.get("speed", {}))


def _speed_rows(speed: Mapping[str, Any]) -> list[Row]:
    """Return a row for each speed that was measured."""
    rows = []
    for batch, parts in speed.get("batches", {}).items():
        for part, label in (("prompt", "Prompts"), ("generation", "Generation")):
            dense, pruned = (f"{parts[part][m]:,.0f} tokens/s" for m in ("dense", "pruned"))
            change = f"{parts[part]['speedup']:.2f}x as fast"
            name = f"{label}, batch {batch}, {speed['device']}"
            rows.append(Row(name, dense, pruned, change))
    return rows


def cost_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the run's cost as (label, text): seconds by stage and in all, and peak memory."""
    seconds, memory = report.get("seconds", {}), report.get("peak_memory_bytes", {})
    rows = [(f"Time, {_STAGES.get(stage, stage)}", duration(s)) for stage, s in seconds.items()]
    if seconds:
        rows.append(("Time, total", duration(sum(s or 0.0 for s in seconds.values()))))
    if compiled := report.get("compilation"):
        kept = "{cached} of {programs} programs cached".format(**compiled)
        rows.append(("… compilation", f"{duration(compiled['seconds'])}, {kept}"))
    return rows + [(f"Peak memory, {place}", size(peak)) for place, peak in memory.items()]
