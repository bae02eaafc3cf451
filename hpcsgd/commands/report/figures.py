"""Draws charts as matplotlib figures, and writes these as PNG and SVG; uses no global state of matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpcsgd.errors import HpcsgdError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Used for ink only, so that `svg` can replace it by the colour of the surrounding text.
INK = "#1a1a1b"
#: Colours of curves: that of the baseline, then Okabe and Ito (2008) without yellow, hard to see on white.
PALETTE = (INK, "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Dashes = Literal["-", "--", "-.", ":"]
DASHES: tuple[Dashes, ...] = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    # Longer labels would not fit beside a panel.
    "axes.formatter.limits": (-2, 5),
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 8,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",
    "svg.hashsalt": "hpcsgd",
    "text.color": INK,
    # A dollar sign in a run's name is not markup.
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": INK,
    "xtick.direction": "out",
    "ytick.color": INK,
}
_PANEL_WIDTH, _PANEL_HEIGHT = 2.4, 2.2
_SINGLE_WIDTH, _SINGLE_HEIGHT = 3.7, 2.6
# Of a panel alone: the same in all, so that panels of a page line up; left, bottom, width, height.
_AXES = (0.16, 0.23, 0.68, 0.72)
_LABEL_AT = -0.19
_LEGEND_LINE_HEIGHT = 0.17
_CHARACTERS_PER_INCH = 13
_MAX_TEXT = 40  # characters of a text in a figure, about the width of a panel


@dataclass(frozen=True)
class PanelPosition:
    """Position of a panel in its row: the first has the axis label, the last the final values as text."""

    first: bool
    last: bool


Panel = Callable[["Axes", PanelPosition], None]


@dataclass(frozen=True)
class Chart:
    """Panels that share a vertical axis and a legend."""

    name: str  # name of the figure's file, without suffix
    title: str
    panels: Sequence[Panel]  # functions that draw the panels
    legend: Sequence[tuple[Artist, str]]  # a handle and a text for each entry of the legend
    captions: Sequence[str] = ()  # title of each panel


def style() -> AbstractContextManager[None]:
    """Context with the style of all figures.

    Raises
    ------
    HpcsgdError
        matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise HpcsgdError("figures need matplotlib", do="pip install 'hpcsgd[report]'") from error
    context: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return context


def draw(chart: Chart, columns: int = 3) -> Figure:
    """Draw the panels of a chart in rows, with the legend above them."""
    with style():
        from matplotlib.figure import Figure

        columns = min(columns, len(chart.panels))
        rows = -(-len(chart.panels) // columns)
        width = max(columns * _PANEL_WIDTH, _SINGLE_WIDTH)
        entries = max(1, int(width * _CHARACTERS_PER_INCH) // (_longest(chart) + 6))
        legend_lines = -(-len(chart.legend) // entries)
        height = _SINGLE_HEIGHT if columns == 1 else _PANEL_HEIGHT
        figure = Figure(
            figsize=(width, rows * height + legend_lines * _LEGEND_LINE_HEIGHT),
            layout="constrained",
        )
        figure.set_label(chart.name)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(chart.panels):
                axes.remove()
                continue
            last = (index + 1) % columns == 0 or index + 1 == len(chart.panels)
            chart.panels[index](axes, PanelPosition(first=index % columns == 0, last=last))
            if chart.captions:
                axes.set_title(short(chart.captions[index]))
        figure.legend(
            [handle for handle, _ in chart.legend],
            [short(text) for _, text in chart.legend],
            loc="outside upper left",
            ncols=min(entries, len(chart.legend)),
        )
        return figure


def draw_alone(panel: Panel) -> Figure:
    """Draw one panel without a legend, with its axes where they are in every other panel."""
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_SINGLE_WIDTH, _SINGLE_HEIGHT))
        axes = figure.add_axes(_AXES)
        panel(axes, PanelPosition(first=True, last=True))
        axes.yaxis.set_label_coords(_LABEL_AT, 0.5)
        return figure


def line_styles(labels: Sequence[str], baselines: Collection[str]) -> dict[str, tuple[str, Dashes]]:
    """Assign a colour and dashes to each label, in the order in which to draw them: baselines first.

    These are in ink; the first one alone, if there are more than kinds of dashes.
    """
    first = [label for label in dict.fromkeys(labels) if label in baselines]
    if len(first) > len(DASHES):
        del first[1:]
    styles = {label: (INK, dashes) for label, dashes in zip(first, DASHES, strict=False)}
    colors = PALETTE[1:]
    for index, label in enumerate(label for label in dict.fromkeys(labels) if label not in styles):
        # A further round of the colours has other dashes.
        dashes = DASHES[(index + index // len(colors)) % len(DASHES)]
        styles[label] = (colors[index % len(colors)], dashes)
    return styles


def short(text: str) -> str:
    """Shorten a name for a legend: a long name keeps its beginning and its end."""
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[: half - 1]}…{text[-half:]}"


def png(figure: Figure, folder: Path) -> Path:
    """Write a figure as `<label>.png` into a folder, on white at 300 dots per inch."""
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        path = folder / f"{figure.get_label()}.png"
        FigureCanvasAgg(figure).print_figure(path, dpi=300, facecolor="white")
        return path


def svg(figure: Figure, description: str) -> str:
    """Return a figure as an SVG element for an HTML page, with ink in the page's text colour.

    The description, for screen readers, is HTML-escaped.
    """
    with style():
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata=nothing)
    text = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    start, content = text[text.index("<svg ") :].split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]*"', start)
    content = content.replace(INK, "currentColor").replace("xlink:href=", "href=")
    return f'<svg role="img" aria-label="{description}" {box}>{content}'


def _longest(chart: Chart) -> int:
    return max(len(short(text)) for _, text in chart.legend)
