"""Render a pruning report as one HTML file.

The page fetches nothing, runs nothing, can be read on a phone, and has the same bytes for the
same report.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.flags import quoting
from launch.report import documentation, figures, measures, quality, recovered, summary
from launch.report.outline import outline

if TYPE_CHECKING:
    import jinja2

_LONG = 24  # a table of more rows starts folded
_SHOWN = 48  # most members of a list in the details; pruning_report.json holds all of them

Facts = list[tuple[str, str]]  # (name, text)


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as one self-contained HTML file.

    Args:
      report: Content of pruning_report.json. `model`, `method` and `sparsity` are required; any
        other part that is missing or empty is left out of the page.
      path: File to write.
    """
    path.write_text(render(report), encoding="utf-8")


def render(report: Mapping[str, Any]) -> str:
    """Return the HTML text of a report; see `write_html`."""
    linears = _linears(report["sparsity"])
    return template("report.html.j2").render(
        report=report,
        model=summary.last_component(str(report["model"])),
        documentation=documentation.pages(report),
        loading=_loading(report),
        snippet=load_snippet(report),
        protocol_note=summary.protocol_note(report),
        tiles=_tiles(recovered.final(report)),
        lights=quality.lights(recovered.final(report)),
        headings=recovered.headings(report),
        quality=recovered.rows(report),
        cost=summary.cost_rows(report),
        expectation=expectation(report),
        plots=figures.plots(report),
        tables=figures.tables(report),
        linears=linears,
        command=_command(report.get("command", "")),
        long=_LONG,
        protocol=_protocol(report.get("protocol", {})),
        settings=flat(report.get("settings", {})),
        details=outline(report.get("details", {}), _SHOWN),
    )


def template(name: str) -> "jinja2.Template":
    """Load one of the page templates that ship with this package.

    Args:
      name: File name of the template.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def expectation(report: Mapping[str, Any]) -> str:
    """Explain what the sparsity saves: zeros stored in place save neither space nor time.

    Args:
      report: The report; its `parameters` tell whether weights were taken out.
    """
    # Not the bytes: those also change with the stored type.
    counts, sparsity = report.get("parameters", {}), report["sparsity"]
    if not sparsity.get("total"):
        return "Nothing was removed: the pruned model is the dense one."
    if counts and counts["pruned"] < 0.999 * counts["dense"]:
        return (
            "The removed weights are no longer stored: the model needs less disk, less memory and "
            "fewer operations, without special kernels. The speed-up depends on the hardware."
        )
    text = (
        "The removed weights are stored as zeros: the model is as large and as fast as before. "
        "This report shows what the sparsity costs in quality; to save memory or time, it takes "
        "sparse storage or sparse kernels."
    )
    pattern = str(report.get("settings", {}).get("pattern", ""))
    if ":" in pattern:
        text += f" Hardware with sparse kernels can run the pattern {pattern} faster."
    return text


def load_snippet(report: Mapping[str, Any]) -> str:
    """Return Python that loads the pruned model with transformers; empty without its place.

    Args:
      report: The report; it has `loading` and the output's directory.
    """
    loading, output = report.get("loading"), report.get("settings", {}).get("output")
    if not loading or not output:
        return ""
    names = ["AutoModelForCausalLM"] + ["AutoTokenizer"] * loading["tokenizer"]
    path = json.dumps(output, ensure_ascii=False)
    code = ", trust_remote_code=True" if loading["trust_remote_code"] else ""
    lines = [
        f"from transformers import {', '.join(names)}",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({path}{code})",
    ]
    if loading["tokenizer"]:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({path})")
    return "\n".join(lines)


def _loading(report: Mapping[str, Any]) -> Facts:
    """Return what the model loads as."""
    loading = report.get("loading")
    if not loading:
        return []
    own = loading["trust_remote_code"]
    code = "needed: the class ships with the model" if own else "not needed"
    return [
        ("class", loading["class"]),
        ("model_type", loading["model_type"]),
        ("trust_remote_code", code),
    ]


def flat(value: Any, prefix: str = "") -> Facts:
    """Flatten nested mappings into (dotted name, text) pairs in their order.

    Args:
      value: A mapping, or a value to show as text.
      prefix: Dotted name of the value.
    """
    if not isinstance(value, Mapping):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return [(prefix, summary.ABSENT if value is None else text or summary.ABSENT)]
    pairs = []
    for key, inner in value.items():
        pairs += flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return pairs


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the headline as (label, number, note): sparsity, each perplexity, size."""
    sparsity, sizes = report["sparsity"], report.get("bytes", {})
    reached = summary.percent(sparsity.get("prunable"))
    tiles = [("sparsity", reached, summary.target(report))]
    perplexity = report.get("perplexity", {})
    labels = summary.short_names(perplexity)
    for name, scores in perplexity.items():
        dense, pruned = scores.get("dense"), scores.get("pruned")
        note = f"dense {summary.perplexity(dense)} ({summary.ratio(dense, pruned)})"
        if agreement := measures.brief(report, name):
            note += f"; {agreement}"
        if spread := summary.draw_spread(report, name):
            note += f"; {spread.mean} over {len(report['draws'])} draws"
        tiles.append((f"perplexity, {labels[name]}", summary.perplexity(pruned), note))
    if sizes:
        dense, pruned = sizes["dense"], sizes["pruned"]
        tiles.append(("weights on disk", summary.size(pruned), summary.difference(dense, pruned)))
    return tiles


def _command(command: str) -> str:
    """Return a shell command with one flag per line, since browsers break lines inside flags."""
    try:
        words = shlex.split(command)
    except ValueError:  # not a command of ours
        return command
    lines: list[str] = []
    for word in map(quoting.quote, words):
        if lines and not word.lstrip("'\"").startswith("--"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n  ".join(lines)


def _linears(sparsity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, target, reached) of every linear, a dash where it has no budget."""
    reached, target = sparsity.get("per_linear", {}), sparsity.get("asked", {})
    return [
        (name, summary.percent(target.get(name)), summary.percent(reached.get(name)))
        for name in dict.fromkeys([*reached, *target])
    ]


def _protocol(protocol: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """Return one card of facts per part of the protocol, one per data set and one per task."""
    cards = []
    for part, value in protocol.items():
        if not isinstance(value, Mapping):
            cards.append((part, flat(value)))
        elif part in ("evaluation", "tasks"):
            labels = summary.short_names(value)
            cards += [(f"{part}: {labels[name]}", flat(facts)) for name, facts in value.items()]
        elif part == "calibration" and "parts" in value:
            cards.append((part, flat({k: v for k, v in value.items() if k != "parts"})))
            cards += [(f"{part}: {own['source']}", flat(own)) for own in value["parts"]]
        else:
            cards.append((part, flat(value)))
    return [(heading, facts) for heading, facts in cards if facts]
