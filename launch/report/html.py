"""The pruning report as one HTML file: nothing to fetch or run, readable on a phone, the same bytes for the same report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.report import kept_plot, plots, quality, summary
from launch.report.accuracy_plot import accuracy_bars

if TYPE_CHECKING:
    import jinja2

_LONG = 24  # a table of more rows starts folded
_SHOWN = 48  # members of one list that the details show; pruning_report.json holds them all

Facts = list[tuple[str, str]]


class Figure(NamedTuple):
    """A plot as SVG text, its heading, and a caption that says how to read it."""

    heading: str
    caption: str
    svg: str


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write `report` (what `launch.prune` writes as pruning_report.json) to `path` as one self-contained HTML file.

    Only `model`, `method` and `sparsity` must be there; any other part that is missing or empty is left out of the page.
    """
    path.write_text(render(report), encoding="utf-8")


def render(report: Mapping[str, Any]) -> str:
    """The HTML text of `report`, a pure function of it. See `write_html`."""
    linears = _linears(report["sparsity"])
    return template("report.html.j2").render(
        report=report,
        followed=summary.followed(report),
        tiles=_tiles(report),
        lights=quality.lights(report),
        quality=summary.quality_rows(report),
        cost=summary.cost_rows(report),
        expectation=expectation(report),
        figures=_figures(report),
        allocation=_allocation(report),
        linears=linears,
        folded=len(linears) > _LONG,
        protocol=_protocol(report.get("protocol", {})),
        settings=flat(report.get("settings", {})),
        details=_outline(report.get("details", {})),
    )


def template(name: str) -> "jinja2.Template":
    """One of the page templates that ship with this package."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=folder,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def expectation(report: Mapping[str, Any]) -> str:
    """What the sparsity buys, told by the bytes on disk: stored zeros buy neither space nor time by themselves."""
    sizes, sparsity = report.get("bytes", {}), report["sparsity"]
    if not sparsity.get("total"):
        return "Nothing was removed: the pruned model is the dense one."
    if sizes and sizes["pruned"] < 0.999 * sizes["dense"]:
        return (
            "The weights were really taken out: the model needs less disk, less memory and fewer operations, with no special "
            "kernels. How much faster it runs depends on the hardware."
        )
    pattern = str(report.get("settings", {}).get("pattern", ""))
    kernels = (
        f" The pattern {pattern} is made for sparse kernels, on hardware that has them."
        if ":" in pattern
        else ""
    )
    return (
        "The removed weights are zeros that stay in place: the model is as large and as fast as before. These figures tell "
        "what the sparsity costs in quality; what it saves takes sparse storage or sparse kernels."
        + kernels
    )


def flat(value: Any, prefix: str = "") -> Facts:
    """Nested mappings as (dotted name, text) pairs in their own order; anything else is one pair."""
    if not isinstance(value, Mapping):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return [(prefix, summary.ABSENT if value is None else text)]
    return [
        pair
        for key, inner in value.items()
        for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline: (label, figure, note) of the sparsity reached, each perplexity, and the size."""
    sparsity, sizes = report["sparsity"], report.get("bytes", {})
    tiles = [
        ("sparsity reached", summary.percent(sparsity.get("prunable")), summary.asked(sparsity))
    ]
    for name, scores in report.get("perplexity", {}).items():
        dense, pruned = scores.get("dense"), scores.get("pruned")
        note = f"from {summary.perplexity(dense)} ({summary.ratio(dense, pruned)})"
        if over := summary.drawn(report, name):
            note += f"; {over.said} over {len(report['draws'])} draws"
        tiles.append((f"perplexity, {summary.shorten(name)}", summary.perplexity(pruned), note))
    if sizes:
        dense, pruned = sizes["dense"], sizes["pruned"]
        tiles.append(("weights on disk", summary.size(pruned), summary.difference(dense, pruned)))
    return tiles


def _figures(report: Mapping[str, Any]) -> list[Figure]:
    perplexity, sparsity, scores = (
        report.get("perplexity", {}),
        report["sparsity"],
        report.get("scores") or {},
    )
    details = report.get("details") or {}
    tokens = "; ".join(
        f"{name}: {s['tokens']:,}" for name, s in perplexity.items() if s.get("tokens")
    )
    documents = "; ".join(
        f"{n}: {facts['documents']:,}"
        for n, facts in report.get("protocol", {}).get("tasks", {}).items()
    )
    label = scores.get("label", "scores")
    drawn = [
        Figure(
            "Perplexity, before and after",
            "Lower is better."
            + (
                " Thin lines reach one standard error over windows to both sides."
                if _has_errors(perplexity)
                else ""
            )
            + (f" Tokens predicted: {tokens}." if tokens else "")
            + _said(summary.followed(report)),
            plots.perplexity_bars(perplexity),
        ),
        Figure(
            "Accuracy, before and after",
            "Higher is better. Thin lines reach one standard error to both sides."
            + (f" Documents: {documents}." if documents else "")
            + _said(summary.followed(report)),
            accuracy_bars(report.get("tasks") or {}),
        ),
        Figure(
            "Sparsity allotted to each block",
            "What the allocation gave each block of the sparsity, whose value for the whole model is the dashed line.",
            plots.allocation_by_block(
                details.get("block_sparsity") or [], sparsity.get("target", 0.0)
            ),
        ),
        *_searches(details),
        *_removals(details),
        *(
            Figure(f"Kept {what}", f"Coloured: kept; empty: removed. {said}.", svg)
            for what, said, svg in kept_plot.pictures(details)
        ),
        Figure(
            "Sparsity in each block",
            "Bars: got. Line across: asked, where the method was given a budget. Linears within half a point "
            "of each other in every block share a panel. Blue: attention; orange: feed-forward; green: both.",
            plots.sparsity_by_block(sparsity.get("per_linear", {}), sparsity.get("asked", {})),
        ),
        Figure(
            f"Scores in each block: {label}",
            "Box: the middle half of the scores, with the median across it. Thin line: smallest to largest.",
            plots.scores_by_block(scores.get("per_linear", {}), label),
        ),
    ]
    return [figure for figure in drawn if figure.svg]


def _has_errors(perplexity: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(
        scores.get(f"{which}_stderr")
        for scores in perplexity.values()
        for which in ("dense", "pruned")
    )


def _said(words: str) -> str:
    """Words as a sentence behind others."""
    return f" {words[0].upper()}{words[1:]}." if words else ""


def _allocation(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(block, what was allotted to it, what that is made from) where an allocator reported it."""
    details = report.get("details", {})
    shares = details.get("block_sparsity") or []
    outliers, exponents = details.get("outliers"), details.get("alpha")
    rows = []
    for i, share in enumerate(shares):
        source = ""
        if outliers:
            source = f"{summary.percent(outliers[i])} outliers"
        elif exponents:
            source = f"exponent {sum(exponents[i].values()) / len(exponents[i]):.3f}"
        rows.append((str(i), summary.percent(share), source))
    return rows


def _searches(details: Mapping[str, Any]) -> list[Figure]:
    """A plot for each step of a search over lambda."""
    return [
        Figure(
            f"Scores of lambda, {step} step",
            "Each point is a trial on the search windows; lower is better. Orange: the one that was chosen.",
            plots.scores_of_lambdas(
                details[f"{step}_lambdas"],
                details[f"{step}_scores"],
                details[f"{step}_lambda"],
                f"{step} step",
            ),
        )
        for step in ("block", "row")
        if details.get(f"{step}_lambdas")
    ]


def _removals(details: Mapping[str, Any]) -> list[Figure]:
    """A plot of a search for what to remove."""
    order, parts = details.get("removal_order") or [], details.get("removed_parts")
    if not order or not details.get("losses"):
        return []
    said = (
        ", ".join(f"{block} ({writer})" for block, writer in parts)
        if parts
        else ", ".join(map(str, order))
    )
    unit = "sublayer" if parts else "block"
    return [
        Figure(
            f"Loss without each {unit}",
            f"A line is a phase, later ones darker; orange is what was removed, in this order: {said}. "
            "A point is missing where the search stopped before its whole loss was known.",
            plots.losses_by_unit(details["losses"], order, unit),
        )
    ]


def _linears(sparsity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, asked, got) of every linear, a dash where the method was given no budget for it."""
    got, asked = sparsity.get("per_linear", {}), sparsity.get("asked", {})
    return [
        (name, summary.percent(asked.get(name)), summary.percent(got.get(name)))
        for name in dict.fromkeys([*got, *asked])
    ]


def _protocol(protocol: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """One card of facts for each part of the protocol; evaluation has one for each data set, tasks one for each task."""
    cards = []
    for part, value in protocol.items():
        if part in ("evaluation", "tasks") and isinstance(value, Mapping):
            cards += [(f"{part}: {name}", flat(facts)) for name, facts in value.items()]
        else:
            cards.append((part, flat(value)))
    return [(heading, facts) for heading, facts in cards if facts]


def _outline(value: Any, indent: str = "") -> str:
    """`value` as indented JSON, each plain list on one line and cut to `_SHOWN` members, so that a phone opens a 70B report."""
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        lines = [
            f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_outline(v, inner)}"
            for key, v in value.items()
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(
        isinstance(v, Mapping | list | tuple) for v in value
    ):
        return "[\n" + ",\n".join(inner + _outline(v, inner) for v in value) + f"\n{indent}]"
    if isinstance(value, list | tuple) and len(value) > _SHOWN:
        return f"{json.dumps(value[:_SHOWN], ensure_ascii=False)[:-1]}, … {len(value):,} in all]"
    return json.dumps(value, ensure_ascii=False)
