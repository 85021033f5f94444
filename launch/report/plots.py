"""The report's plots, as SVG text that sits inside an HTML page: no outside reference, no date, text in the page's own colour.

One plot, of speed, is a file of its own.

Colours are Paul Tol's "vibrant" scheme (SRON/EPS/TN/09-002), which colour-blind readers can tell apart, and every plot also says
in words what its colours say.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.report import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, TEAL, GREY = "#0077bb", "#ee7733", "#009988", "#999999"
INK = "#12171d"  # never seen: becomes currentColor, so that one drawing serves the light and the dark page
WIDTH = 5.0  # inches: text of 10 points stays readable when a phone shows the plot 330 pixels wide
_SAME = 0.005  # profiles this close in every block would draw the same bars, and share a panel
STYLE = {
    "svg.fonttype": "none",  # real text: the page's font, searchable, small
    "text.parse_math": False,  # a data set may be called a$b$
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "hatch.color": INK,
    "hatch.linewidth": 0.5,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
)


def split(name: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.up_proj` → (3, "mlp.up_proj"): the block and the kind of a linear; None for one outside the blocks."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else None


def sparsity_by_block(got: Mapping[str, float], asked: Mapping[str, float]) -> str:
    """Bars of the sparsity got in each block, a tick where it was asked; kinds of linear with equal profiles share a panel.

    `got` and `asked` map a linear's name to a fraction; `asked` may lack linears. Returns SVG text, or "" with no block to draw.
    """
    got_of, asked_of = _by_kind(got), _by_kind(asked)
    panels = _panels(
        got_of,
        lambda a, b: (
            _close(got_of[a], got_of[b]) and _close(asked_of.get(a, {}), asked_of.get(b, {}))
        ),
    )
    if not panels:
        return ""
    top = max([*_finite(got.values()), *_finite(asked.values()), 0.0])

    def draw(axes: Sequence["Axes"]) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            bars, ticks = got_of[panel[0]], asked_of.get(panel[0], {})
            ax.bar(list(bars), list(bars.values()), width=0.8, color=_colour(panel))
            ax.hlines(
                list(ticks.values()),
                [i - 0.48 for i in ticks],
                [i + 0.48 for i in ticks],
                colors=INK,
                linewidth=1.6,
            )
            ax.set_ylim(0.0, 1.12 * top if top else 1.0)
            ax.locator_params(axis="y", nbins=4)
            ax.yaxis.set_major_formatter(lambda value, _: summary.percent(value))
            _title(ax, panel)
            ax.set_title(
                _span([fraction for kind in panel for fraction in got_of[kind].values()]),
                loc="right",
            )
        _block_axis(axes, {i for profile in got_of.values() for i in profile})

    return render("Sparsity per block", len(panels), 1.15, draw)


def allocation_by_block(fractions: Sequence[float], target: float) -> str:
    """Bars of what was allotted to each block, a line at the target for the whole model. Returns SVG text, or "" with no block."""
    if not fractions:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        ax.bar(range(len(fractions)), fractions, width=0.8, color=TEAL)
        ax.axhline(target, color=INK, linewidth=1.0, linestyle="--")
        ax.yaxis.set_major_formatter(lambda value, _: summary.percent(value))
        ax.set_title(_span(fractions), loc="right")
        _block_axis(axes, set(range(len(fractions))))

    return render("Sparsity allotted to each block", 1, 1.9, draw)


def scores_of_lambdas(
    lambdas: Sequence[float], scores: Sequence[float], best: float | None, what: str
) -> str:
    """The scores of the values of lambda that were tried, the chosen one marked; lower is better. Returns SVG text, or "" without any."""
    points = [
        (lam, score) for lam, score in zip(lambdas, scores, strict=True) if math.isfinite(score)
    ]
    if not points:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        ax.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4)
        chosen = [point for point in points if point[0] == best]
        ax.plot(
            *zip(*chosen, strict=True), color=ORANGE, marker="o", markersize=8, linestyle=""
        ) if chosen else None
        ax.yaxis.set_major_formatter(lambda value, _: tick(value))
        ax.grid(axis="y")
        ax.set_xlabel("lambda")

    return render(f"Scores of lambda, {what}", 1, 1.9, draw)


def losses_by_unit(
    losses: Sequence[Sequence[float | None]], order: Sequence[int], unit: str
) -> str:
    """A line for each phase of a search: the loss without each unit, the removed ones marked; later phases are darker.

    Args:
      losses: a phase's by unit, None where it is not known; order: the units removed, one a phase, or all after a single one.
    The axis ends at five times the spread of the lower half, so that a unit nothing works without does not hide the others. Returns SVG
    text, or "" without losses.
    """
    known = sorted(_finite(loss for phase in losses for loss in phase))
    if not known:
        return ""
    top = known[0] + 5 * (known[len(known) // 2] - known[0])

    def draw(axes: Sequence["Axes"]) -> None:
        (ax,) = axes
        for p, phase in enumerate(losses):
            points = [
                (u, loss)
                for u, loss in enumerate(phase)
                if loss is not None and math.isfinite(loss)
            ]
            ax.plot(
                *zip(*points, strict=True),
                color=BLUE,
                alpha=0.3 + 0.7 * (p + 1) / len(losses),
                marker=".",
                linewidth=1.0,
            )
            chosen = [
                (u, loss)
                for u, loss in points
                if u in (order if len(losses) == 1 else order[p : p + 1])
            ]
            ax.plot(
                *zip(*chosen, strict=True), color=ORANGE, marker="o", markersize=6, linestyle=""
            )
        if top > known[0]:
            ax.set_ylim(top=min(top, known[-1] + 0.05 * (known[-1] - known[0])))
        ax.yaxis.set_major_formatter(lambda value, _: tick(value))
        _block_axis(axes, set(range(max(map(len, losses)))))
        ax.set_xlabel(unit)

    return render("Loss without each unit", 1, 2.4, draw)


def perplexity_bars(perplexity: Mapping[str, Mapping[str, Any]]) -> str:
    """Two bars for each data set, dense and pruned; a value that is not finite is a hatched bar to the edge, said in words.

    From zero, or, where the values spread over more than a factor 20, on a log axis from 1, on which a bar's length is the
    cross-entropy. Returns SVG text, or "" with nothing measured.
    """
    if not perplexity:
        return ""
    values = [scores.get(key) for scores in perplexity.values() for key in ("dense", "pruned")]
    finite = [v for v in _finite(values) if v > 0]
    log = bool(finite) and max(finite) > 20 * min(finite)
    base, top = (1.0 if log else 0.0), min(max(finite, default=1.0), 1e100)
    # Beyond 1e100 the axis has said enough (and float64 ends); room on the right for the figures, in the axis's own measure.
    edge = top**1.55 if log else 1.45 * top

    def draw(axes: Sequence["Axes"]) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        (ax,) = axes
        if log:
            ax.set_xscale("log")
        for row, scores in enumerate(perplexity.values()):
            for offset, key, colour in ((-0.2, "dense", GREY), (0.2, "pruned", BLUE)):
                error = scores.get(f"{key}_stderr") or 0.0
                _perplexity_bar(
                    ax, row + offset, scores.get(key), f"{key} ", colour, (base, top), error
                )
        ax.set_yticks(range(len(perplexity)), [summary.shorten(name) for name in perplexity])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(perplexity) - 0.5, -0.5)
        ax.set_xlim(base, edge)
        ax.xaxis.set_major_formatter(lambda value, _: tick(value))
        ax.xaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(nbins=5))
        ax.minorticks_off()
        ax.grid(axis="x")
        ax.set_xlabel("perplexity (log axis)" if log else "perplexity")

    return render("Perplexity before and after", 1, 0.55 + 0.62 * len(perplexity), draw)


def scores_by_block(quantiles: Mapping[str, Sequence[float]], label: str) -> str:
    """A box for each block from five quantiles [min, q25, median, q75, max] of the scores, one panel for each kind of linear.

    Kinds with equal quantiles (the matrices of one group of neurons) share a panel. The axis is logarithmic where positive scores
    spread over more than a factor 100; a whisker that starts at zero then starts at the edge. Blocks with a score that is not
    finite are left out. Returns SVG text, or "" with nothing to draw.
    """
    kinds = {
        kind: {i: q for i, q in boxes.items() if len(_finite(q)) == 5}
        for kind, boxes in _by_kind(quantiles).items()
    }
    kinds = {kind: boxes for kind, boxes in kinds.items() if boxes}
    panels = _panels(kinds, lambda a, b: kinds[a] == kinds[b])
    if not panels:
        return ""

    def draw(axes: Sequence["Axes"]) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            _boxes(ax, kinds[panel[0]], _colour(panel))
            _title(ax, panel)
        _block_axis(axes, {i for boxes in kinds.values() for i in boxes})

    return render(f"Scores per block: {label}", len(panels), 1.5 if len(panels) > 1 else 2.5, draw)


def save_speed(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw prompt seconds and generated tokens a second of each batch size's models, as `launch.benchmarks.speed` has them, to .svg or .png.

    Bars are medians, thin lines reach from the slowest run to the fastest.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    most = max(map(len, figures.values()))
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": "speed"}]):
        figure = Figure(
            figsize=(2 * WIDTH, 0.6 + len(figures) * (0.5 + 0.35 * most)), layout="constrained"
        )
        grid = figure.subplots(len(figures), 2, sharey="row", squeeze=False)
        for axes, (batch, rows) in zip(grid, figures.items(), strict=True):
            for ax, part in zip(axes, ("prompt", "generation"), strict=True):
                _speed_bars(ax, rows, part)
            axes[0].set_title(f"prompt, seconds (batch {batch})")
            axes[1].set_title(f"generation, tokens/s (batch {batch})")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _speed_bars(ax: "Axes", rows: Mapping[str, Mapping[str, Any]], part: str) -> None:
    for y, row in enumerate(rows.values()):
        median, seconds = row["median"][part], row["seconds"][part]
        bar, least, most = (
            s if part == "prompt" else row["generated"] / s
            for s in (median, min(seconds), max(seconds))
        )
        ax.barh(y, bar, height=0.7, color=TEAL if y else GREY)
        ax.hlines(y, least, most, colors=INK, linewidth=1.0)
        ax.annotate(f"{bar:.3g}", (0, y), xytext=(3, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), [summary.shorten(name) for name in rows])
    if not ax.yaxis_inverted():  # the two panels share the axis
        ax.invert_yaxis()


def render(title: str, panels: int, height: float, draw: Callable[[Sequence["Axes"]], None]) -> str:
    """A column of `panels` axes of `height` inches, filled by `draw`, as an `<svg>` element; screen readers say its `title`."""
    import matplotlib.style
    from matplotlib.figure import Figure

    # "default" first: the user's own matplotlibrc must not change a report. The salt names the SVG's internal references.
    with (
        matplotlib.style.context(["default", STYLE | {"svg.hashsalt": title}]),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # the page's font draws it, not matplotlib's
        figure = Figure(figsize=(WIDTH, 0.5 + panels * height), layout="constrained")
        draw(list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0]))
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing | {"Title": title})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # Inside HTML, namespaces are implied; the running group names (axes_1) would be double on a page with two plots.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def _by_kind(per_linear: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    kinds: dict[str, dict[int, Any]] = {}
    for name, value in per_linear.items():
        place = split(name)
        if place and value is not None:
            kinds.setdefault(place[1], {})[place[0]] = value
    return kinds


def _panels(kinds: Iterable[str], same: Callable[[str, str], bool]) -> list[list[str]]:
    """The kinds in their order, each joined to the first panel whose first kind is the same."""
    panels: list[list[str]] = []
    for kind in kinds:
        panel = next((panel for panel in panels if same(panel[0], kind)), None)
        if panel is None:
            panels.append(panel := [])
        panel.append(kind)
    return panels


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _close(a: Mapping[int, float], b: Mapping[int, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[i] - b[i]) <= _SAME for i in a)


def _colour(kinds: Sequence[str]) -> str:
    attention = {"attn" in kind for kind in kinds}
    return TEAL if len(attention) == 2 else BLUE if attention == {True} else ORANGE


def _title(ax: "Axes", kinds: Sequence[str]) -> None:
    ax.set_title(textwrap.fill(", ".join(kind.rpartition(".")[2] for kind in kinds), 40))


def _span(fractions: Sequence[float]) -> str:
    low, high = summary.percent(min(fractions)), summary.percent(max(fractions))
    return low if low == high else f"{low} to {high}"


def tick(value: float) -> str:
    """A tick's number, short: 0.001, 250, 10,000, 1e7."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def _block_axis(axes: Sequence["Axes"], blocks: set[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    for ax in axes:
        ax.grid(axis="y")
        ax.tick_params(axis="x", length=0)
    axes[-1].set_xlim(min(blocks) - 0.75, max(blocks) + 0.75)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes[-1].set_xlabel("block")


def _perplexity_bar(
    ax: "Axes",
    y: float,
    value: float | None,
    name: str,
    colour: str,
    span: tuple[float, float],
    error: float,
) -> None:
    base, top = span
    if value is None:
        return
    finite = math.isfinite(value)
    end = min(max(value, base), top) if finite else top
    hatch = None if finite else "////"
    ax.barh(
        y,
        end - base,
        left=base,
        height=0.36,
        color=colour,
        edgecolor=INK,
        linewidth=0.0,
        hatch=hatch,
    )
    right = min(end + error, top)
    if error and finite:
        ax.hlines(y, max(end - error, base), right, colors=INK, linewidth=1.0)
    ax.annotate(
        name + summary.perplexity(value),
        (right, y),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _boxes(ax: "Axes", boxes: Mapping[int, Sequence[float]], colour: str) -> None:
    blocks = list(boxes)
    low, q25, median, q75, high = (list(column) for column in zip(*boxes.values(), strict=True))
    positive = [v for quantiles in boxes.values() for v in quantiles if v > 0]
    if positive and min(low) >= 0 and max(high) > 100 * min(positive):
        ax.set_yscale("log")
        ax.set_ylim(min(positive) / 1.5, max(high) * 1.5)
        floor = (
            min(positive) / 10
        )  # zero has no place on a log axis: below the edge, where it is clipped
        low, q25, median, q75 = (
            [max(v, floor) for v in column] for column in (low, q25, median, q75)
        )
        ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: tick(value))
    ax.vlines(blocks, low, high, colors=INK, alpha=0.55, linewidth=1.0)
    ax.bar(
        blocks, [b - a for a, b in zip(q25, q75, strict=True)], bottom=q25, width=0.7, color=colour
    )
    ax.hlines(
        median, [i - 0.35 for i in blocks], [i + 0.35 for i in blocks], colors=INK, linewidth=1.6
    )
