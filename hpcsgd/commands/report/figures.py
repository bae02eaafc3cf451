"""Charts to figures, and figures to PNG and SVG; matplotlib without any state of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpcsgd.commands.report.labels import LONGEST
from hpcsgd.errors import HpcsgdError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ink is a colour of its own so that an SVG can replace it by that of the text around it.
INK = "#1a1a1b"
# Okabe and Ito (2008), without the yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
Dashes = Literal["-", "--", "-.", ":"]
DASHES: tuple[Dashes, ...] = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
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
    # A dollar in a run's name is a dollar.
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": INK,
    "xtick.direction": "out",
    "ytick.color": INK,
}
_PANEL_WIDTH, _PANEL_HEIGHT = 2.4, 2.2
_ALONE_WIDTH, _ALONE_HEIGHT = 3.7, 2.5
_LEGEND_LINE = 0.17
_CHARACTERS_PER_INCH = 13


@dataclass(frozen=True)
class Place:
    """Where a panel lies in its row: the first says what is measured, the last how it ends."""

    first: bool
    last: bool


Panel = Callable[["Axes", Place], None]


@dataclass(frozen=True)
class Chart:
    """Panels that share a vertical axis and a legend.

    Parameters
    ----------
    name
        The name of its file, without suffix.
    title
        What it shows, in words.
    panels
        What draws each panel.
    legend
        A handle and a text for each entry of the legend.
    """

    name: str
    title: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[Artist, str]]

    def alone(self) -> list[Chart]:
        """Each panel as a chart of its own."""
        return [Chart(self.name, self.title, [panel], self.legend) for panel in self.panels]


def style() -> AbstractContextManager[None]:
    """The look of all figures, for the length of a `with` block.

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
    """Draw the panels of a chart in rows; the legend lies above them, off the data."""
    with style():
        from matplotlib.figure import Figure

        columns = min(columns, len(chart.panels))
        rows = -(-len(chart.panels) // columns)
        width = max(columns * _PANEL_WIDTH, _ALONE_WIDTH)
        entries = max(1, int(width * _CHARACTERS_PER_INCH) // (_longest(chart) + 6))
        legend_lines = -(-len(chart.legend) // entries)
        height = _ALONE_HEIGHT if columns == 1 else _PANEL_HEIGHT
        figure = Figure(
            figsize=(width, rows * height + legend_lines * _LEGEND_LINE),
            layout="constrained",
        )
        figure.set_label(chart.name)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(chart.panels):
                axes.remove()
                continue
            last = (index + 1) % columns == 0 or index + 1 == len(chart.panels)
            chart.panels[index](axes, Place(first=index % columns == 0, last=last))
        figure.legend(
            [handle for handle, _ in chart.legend],
            [short(text) for _, text in chart.legend],
            loc="outside upper left",
            ncols=min(entries, len(chart.legend)),
        )
        return figure


def short(text: str) -> str:
    """A name that fits a legend: where it is long, its two ends."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def png(figure: Figure, folder: Path) -> Path:
    """Write a figure as `<label>.png` into a folder, on white at 300 dots an inch."""
    with style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        path = folder / f"{figure.get_label()}.png"
        FigureCanvasAgg(figure).print_figure(path, dpi=300, facecolor="white")
        return path


def svg(figure: Figure, description: str) -> str:
    """A figure as an SVG element to stand in a page: ink takes the page's text colour.

    Parameters
    ----------
    figure
        The figure.
    description
        What it shows, for who cannot see it; escaped already.
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
