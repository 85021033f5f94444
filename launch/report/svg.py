"""Render matplotlib axes as SVG text for the report's page, or as a file.

SVG text has no external reference, no date, and takes the page's text colour. Colours are Paul
Tol's "vibrant" scheme (SRON/EPS/TN/09-002), which colour-blind readers can tell apart. Every plot
also says in words what its colours mean.
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, TEAL, GREY = "#0077bb", "#ee7733", "#009988", "#999999"
# Colours and markers of the curves of a plot; the marker repeats what the colour says.
COLOURS = (BLUE, ORANGE, TEAL, "#cc3311", "#33bbee", GREY, "#ee3377")
MARKERS = "osD^vXP*"
PALE_INK = "#e6edf3"  # for dark pages
INK = "#12171d"  # replaced by currentColor, so one drawing serves the light and the dark page
_LOG_RANGE = 4  # a larger ratio of perplexities takes a log axis
WIDTH = 5.0  # inches: text of 10 points stays readable when a phone shows the plot 330 px wide
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
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextlib.contextmanager
def style(salt: str, ink: str = INK) -> Iterator[None]:
    """Draw in the report's style, whatever the user's matplotlibrc says.

    Args:
      salt: Names the SVG's internal references, so that equal plots have equal bytes.
      ink: Colour of text, axes and grid.
    """
    import matplotlib.style

    settings = {key: ink if value == INK else value for key, value in STYLE.items()}
    with matplotlib.style.context(["default", settings | {"svg.hashsalt": salt}]):
        yield


def render(title: str, panels: int, height: float, draw: Callable[[Sequence["Axes"]], None]) -> str:
    """Return an `<svg>` element with a column of axes.

    Args:
      title: Description for screen readers.
      panels: Number of axes, which share the x axis.
      height: Height of one of them in inches.
      draw: Fills the axes.
    """
    from matplotlib.figure import Figure

    with style(title), warnings.catch_warnings():
        # The page's font draws the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, 0.5 + panels * height), layout="constrained")
        draw(list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0]))
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        metadata = no_metadata | {"Title": title}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # HTML implies the namespaces; running group names (axes_1) would repeat on one page.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def save(figure: "Figure", path: Path, transparent: bool = False) -> None:
    """Write a figure to .svg or .png, an SVG without its date so that equal plots are equal.

    Args:
      figure: The figure.
      path: File to write.
      transparent: Leave the background to the page.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, transparent=transparent)


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are known and finite."""
    return [v for v in values if v is not None and math.isfinite(v)]


def tick(value: float) -> str:
    """Format an axis tick: 0.001, 250, 10,000, 1e7."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def perplexity_axis(ax: "Axes", values: Iterable[float]) -> None:
    """Make the y axis one of perplexities, logarithmic where they lie far apart.

    Args:
      ax: The axes.
      values: The perplexities, finite.
    """
    from matplotlib.ticker import LogLocator

    known = [value for value in values if value > 0]
    if known and max(known) > _LOG_RANGE * min(known):
        ax.set_yscale("log")
        few_decades = max(known) < 1000 * min(known)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: tick(value))


def block_axis(axes: Sequence["Axes"], blocks: Iterable[int], label: str = "block") -> None:
    """Make the shared x axis one of blocks, with integer ticks and horizontal grid lines.

    Args:
      axes: Axes below each other.
      blocks: Indices on the axis.
      label: Name of the axis.
    """
    from matplotlib.ticker import MaxNLocator

    for ax in axes:
        ax.grid(axis="y")
        ax.tick_params(axis="x", length=0)
    every = list(blocks)
    axes[-1].set_xlim(min(every) - 0.75, max(every) + 0.75)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes[-1].set_xlabel(label)
