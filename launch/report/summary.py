"""The figures of a pruning report in words: one source for the terminal's table and the HTML page, so the two cannot disagree."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

ABSENT = "—"
_STAGES = {
    "load": "load",
    "calibrate_and_prune": "calibrate and prune",
    "draws": "other draws",
    "eval": "evaluate",
    "export": "export",
}


class Row(NamedTuple):
    """One line of the summary: a quantity of the dense model, of the pruned model, and what became of it. All display text."""

    label: str
    dense: str
    pruned: str
    change: str


def perplexity(value: float | None) -> str:
    """A perplexity in about four figures; it may be missing, infinite or NaN (a collapsed model is a result, not an error)."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return (
        f"{value:,.0f}"
        if abs(value) >= 1e4
        else f"{value:,.1f}"
        if abs(value) >= 1e3
        else f"{value:.3f}"
    )


def percent(fraction: float | None) -> str:
    """A fraction (0.2997) as a percentage of two decimals (29.97%), without trailing zeros."""
    if fraction is None or not math.isfinite(fraction):
        return ABSENT if fraction is None else str(float(fraction))
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def count(number: int | None) -> str:
    """An exact count, with separators."""
    return ABSENT if number is None else f"{number:,}"


def size(byte_count: int | None) -> str:
    """Bytes in the binary unit that keeps the figure between 1 and 1024; below 1 KiB, exactly."""
    if byte_count is None:
        return ABSENT
    if byte_count < 1024:
        return f"{byte_count} B"
    power = min((int(byte_count).bit_length() - 1) // 10, 4)
    return f"{byte_count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 0.42 s, 12.3 s, 4 min 05 s, 2 h 05 min."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def ratio(dense: float | None, pruned: float | None) -> str:
    """`pruned / dense` as 1.148x; a dash where either is missing, not finite, or `dense` is zero."""
    if (
        dense is None
        or pruned is None
        or not dense
        or not math.isfinite(dense)
        or not math.isfinite(pruned)
    ):
        return ABSENT
    value = pruned / dense
    return (
        f"{value:.2e}x" if value >= 1e4 else f"{value:,.0f}x" if value >= 100 else f"{value:.3f}x"
    )


def difference(dense: float | None, pruned: float | None) -> str:
    """The relative change of a count as -19.97%, or `unchanged`."""
    if not dense or pruned is None:
        return ABSENT
    if dense == pruned:
        return "unchanged"
    return f"{100 * (pruned / dense - 1):+.2f}%"


def shorten(name: str, width: int = 24) -> str:
    """A long path by its end, where it differs from others, whole names if they fit: …/tokens/valid.npy."""
    if len(name) <= width:
        return name
    end = name[1 - width :]
    return "…" + end[max(end.find("/"), 0) :]


def asked(sparsity: Mapping[str, Any]) -> str:
    """`asked 30%`, or nothing where the run had no target of its own."""
    return "" if sparsity.get("target") is None else f"asked {percent(sparsity['target'])}"


def followed(report: Mapping[str, Any]) -> str:
    """The protocol that was asked for by name, and the flags that were given other values than its own; nothing without one."""
    protocol = report.get("protocol", {})
    if "name" not in protocol:
        return ""
    changed = ", ".join(
        f"--{flag}={value}" for flag, value in protocol.get("overridden", {}).items()
    )
    return f"protocol {protocol['name']}" + (f", but {changed}" if changed else "")


class Drawn(NamedTuple):
    """A perplexity over calibration draws. `said`: mean ± sample standard deviation; `span`: least to most."""

    said: str
    span: str


def drawn(report: Mapping[str, Any], data: str) -> Drawn | None:
    """The perplexity on a data set over the run's calibration draws; None if there was one alone."""
    found = report.get("spread", {}).get("perplexity", {}).get(data)
    if not found:
        return None
    said = measured((found["mean"], found["std"]), fraction=False)
    return Drawn(said, f"{perplexity(found['min'])} to {perplexity(found['max'])}")


class Metric(NamedTuple):
    """A metric of a task with its standard error (None: it has none), of the dense and of the pruned model; None where it was not run."""

    task: str
    name: str
    dense: tuple[float, float | None] | None
    pruned: tuple[float, float | None] | None

    @property
    def fraction(self) -> bool:
        """Whether it is a share of the documents, to be said in percent."""
        return self.name.startswith(("acc", "exact_match"))


def metrics(tasks: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    """Every metric of the report's `tasks` {task: {"dense": {metric: value, metric_stderr: error}, "pruned": …}}."""

    def read(figures: Mapping[str, Any], metric: str) -> tuple[float, float | None] | None:
        name, comma, of_filter = metric.partition(",")
        value = figures.get(metric)
        return None if value is None else (value, figures.get(f"{name}_stderr{comma}{of_filter}"))

    return [
        Metric(
            task,
            metric,
            read(models.get("dense", {}), metric),
            read(models.get("pruned", {}), metric),
        )
        for task, models in tasks.items()
        for metric in models.get("dense", {})
        if not metric.partition(",")[0].endswith("_stderr")
    ]


def measured(value: tuple[float, float | None] | None, fraction: bool) -> str:
    """A value with its standard error: 42.50% ± 3.50%, digits alike in all of a column, or 12.310 ± 0.421."""
    if value is None:
        return ABSENT
    say = "{:.2%}".format if fraction else perplexity
    return say(value[0]) + ("" if value[1] is None else f" ± {say(value[1])}")


def task_rows(
    tasks: Mapping[str, Mapping[str, Any]], spread: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Row]:
    """A row for each metric of each task; accuracies in percent, their changes in points. One more where it has a `spread` over draws."""
    rows = []
    for m in metrics(tasks):
        change = ABSENT
        if m.dense and m.pruned:
            change = (
                f"{100 * (m.pruned[0] - m.dense[0]):+.2f} points"
                if m.fraction
                else ratio(m.dense[0], m.pruned[0])
            )
        rows.append(
            Row(
                f"{m.task}, {m.name}",
                measured(m.dense, m.fraction),
                measured(m.pruned, m.fraction),
                change,
            )
        )
        if found := (spread or {}).get(m.task, {}).get(m.name):
            say = percent if m.fraction else perplexity
            said = measured((found["mean"], found["std"]), m.fraction)
            rows.append(
                Row(
                    "… over calibration draws",
                    "",
                    said,
                    f"{say(found['min'])} to {say(found['max'])}",
                )
            )
    return rows


def quality_rows(report: Mapping[str, Any]) -> list[Row]:
    """Perplexity per data set, metrics per task, sparsity, parameters and bytes, dense → pruned. Every key of the report may be missing."""
    rows = []
    for name, scores in report.get("perplexity", {}).items():
        dense, pruned = scores.get("dense"), scores.get("pruned")
        before, after = (
            measured(
                None
                if scores.get(which) is None
                else (scores[which], scores.get(f"{which}_stderr")),
                fraction=False,
            )
            for which in ("dense", "pruned")
        )
        rows.append(Row(f"Perplexity, {name}", before, after, ratio(dense, pruned)))
        if over := drawn(report, name):
            rows.append(
                Row(f"… over {len(report['draws'])} calibration draws", "", over.said, over.span)
            )
    rows += task_rows(report.get("tasks", {}), report.get("spread", {}).get("tasks", {}))
    sparsity = report.get("sparsity", {})
    rows.append(Row("Sparsity, prunable", "", percent(sparsity.get("prunable")), asked(sparsity)))
    rows.append(Row("Sparsity, whole model", "", percent(sparsity.get("total")), ""))
    counts, sizes = report.get("parameters", {}), report.get("bytes", {})
    dense, pruned = counts.get("dense"), counts.get("pruned")
    rows.append(Row("Parameters", count(dense), count(pruned), difference(dense, pruned)))
    dense, pruned = sizes.get("dense"), sizes.get("pruned")
    rows.append(Row("Weights on disk", size(dense), size(pruned), difference(dense, pruned)))
    return rows


def cost_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run cost: the seconds of each stage and in all, and the peak memory, as (label, text)."""
    seconds, memory = report.get("seconds", {}), report.get("peak_memory_bytes", {})
    rows = [
        (f"Time, {_STAGES.get(stage, stage)}", duration(spent)) for stage, spent in seconds.items()
    ]
    if seconds:
        rows.append(("Time, in all", duration(sum(spent or 0.0 for spent in seconds.values()))))
    return rows + [(f"Peak memory, {place}", size(peak)) for place, peak in memory.items()]
