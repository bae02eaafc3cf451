"""Curves in a panel: what is measured against what it costs, with the last values written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.commands.report.figures import Dashes, Place
from hpcsgd.commands.report.records import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM_RATIO = 20
_LINE_OF_TEXT = 0.085
_MOST_LAST_VALUES = 10


@dataclass(frozen=True)
class Curve:
    """One run's values, float64 of shape (evaluations,), and how its line looks."""

    x: Floats
    y: Floats
    color: str
    dashes: Dashes

    @property
    def end(self) -> tuple[float, float] | None:
        """The last point that can be drawn, if there is any."""
        finite = np.flatnonzero(np.isfinite(self.x) & np.isfinite(self.y))
        return (float(self.x[finite[-1]]), float(self.y[finite[-1]])) if finite.size else None


def draw_curves(
    axes: Axes,
    place: Place,
    *,
    xlabel: str,
    ylabel: str,
    curves: Sequence[Curve],
    log: bool,
    write: Callable[[float], str],
) -> None:
    """Draw curves into a panel, with gaps where values are not finite.

    Parameters
    ----------
    axes, place
        The panel, and where it lies in its row.
    xlabel, ylabel
        Names of the axes, with units.
    curves
        The curves.
    log
        Whether the vertical axis is logarithmic.
    write
        Writes a last value.
    """
    if log:
        _logarithmic(axes)
    for curve in curves:
        axes.plot(_finite(curve.x), _finite(curve.y), color=curve.color, linestyle=curve.dashes)
        if curve.end:
            axes.plot(*curve.end, color=curve.color, marker="o", markersize=3)
    axes.set_xlim(left=0)
    axes.set_xlabel(xlabel)
    vertical(axes, place, ylabel)
    if place.last and len(curves) <= _MOST_LAST_VALUES:
        _last_values(axes, curves, write)


def vertical(axes: Axes, place: Place, name: str) -> None:
    """Name the vertical axis, once a row."""
    axes.tick_params(axis="y", which="both", left=place.first)
    if place.first:
        axes.set_ylabel(name)


def spans_decades(values: Sequence[Floats]) -> bool:
    """Whether values are so far apart that only a logarithmic axis shows them all."""
    joined = np.concatenate(values)
    finite = joined[np.isfinite(joined)]
    return bool(finite.size and finite.min() > 0 and finite.max() > _LOG_FROM_RATIO * finite.min())


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def _last_values(axes: Axes, curves: Sequence[Curve], write: Callable[[float], str]) -> None:
    ends = []
    for curve in curves:
        if curve.end:
            point = axes.transData.transform((0.0, curve.end[1]))
            ends.append((float(axes.transAxes.inverted().transform(point)[1]), curve))
    ends.sort(key=lambda end: end[0])
    for height, (_, curve) in zip(_apart([height for height, _ in ends]), ends, strict=True):
        axes.text(
            1.02,
            height,
            write(float(curve.y[-1])),
            color=curve.color,
            transform=axes.transAxes,
            va="center",
        )


def _apart(heights: list[float]) -> list[float]:
    """Move sorted heights as little as lets each have a line of text, within the panel."""
    placed = list(heights)
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + _LINE_OF_TEXT)
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - _LINE_OF_TEXT
    return placed


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
