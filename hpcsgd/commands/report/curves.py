"""Curves in a panel: a metric against its cost, with the last values as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.commands.report.figures import Dashes, PanelPosition
from hpcsgd.commands.report.records import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM_RATIO = 20
_LINE_OF_TEXT = 0.085
_MAX_LAST_VALUES = 10
_MARGIN = 1.05


@dataclass(frozen=True)
class Curve:
    """The values of one run, float64 of shape (evaluations,), and the style of its line."""

    x: Floats
    y: Floats
    color: str
    dashes: Dashes

    @property
    def last_point(self) -> tuple[float, float] | None:
        """The last point with finite coordinates, if there is one."""
        finite = np.flatnonzero(np.isfinite(self.x) & np.isfinite(self.y))
        return (float(self.x[finite[-1]]), float(self.y[finite[-1]])) if finite.size else None


def draw_curves(
    axes: Axes,
    position: PanelPosition,
    *,
    xlabel: str,
    ylabel: str,
    curves: Sequence[Curve],
    log: bool,
    format_value: Callable[[float], str],
    right: float | None = None,
) -> None:
    """Draw curves into a panel, with gaps where values are not finite.

    `format_value` formats the last value of a curve. The horizontal axis ends at `right`, and a margin;
    default: at the end of the curves.
    """
    if log:
        _logarithmic(axes)
    for curve in curves:
        axes.plot(_finite(curve.x), _finite(curve.y), color=curve.color, linestyle=curve.dashes)
        if curve.last_point:
            axes.plot(*curve.last_point, color=curve.color, marker="o", markersize=3)
        # Also where x is not finite, so that all panels of a row have the same scale.
        axes.dataLim.update_from_data_y(curve.y[np.isfinite(curve.y)], ignore=False)
    axes.autoscale_view()
    axes.set_xlim(0, None if right is None else _MARGIN * right or 1)
    axes.set_xlabel(xlabel)
    vertical(axes, position, ylabel)
    if position.last and len(curves) <= _MAX_LAST_VALUES:
        _last_values(axes, curves, format_value)


def vertical(axes: Axes, position: PanelPosition, name: str) -> None:
    """Label the vertical axis, on the first panel of a row only."""
    axes.tick_params(axis="y", which="both", left=position.first)
    if position.first:
        axes.set_ylabel(name)


def spans_decades(values: Sequence[Floats]) -> bool:
    """Whether the values range so widely that they need a logarithmic axis."""
    joined = np.concatenate(values)
    finite = joined[np.isfinite(joined)]
    return bool(finite.size and finite.min() > 0 and finite.max() > _LOG_FROM_RATIO * finite.min())


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def _last_values(axes: Axes, curves: Sequence[Curve], format_value: Callable[[float], str]) -> None:
    ends = []
    for curve in curves:
        if curve.last_point:
            point = axes.transData.transform((0.0, curve.last_point[1]))
            ends.append((float(axes.transAxes.inverted().transform(point)[1]), curve))
    ends.sort(key=lambda end: end[0])
    for height, (_, curve) in zip(_separate([height for height, _ in ends]), ends, strict=True):
        axes.text(
            1.02,
            height,
            format_value(float(curve.y[-1])),
            color=curve.color,
            transform=axes.transAxes,
            va="center",
        )


def _separate(heights: list[float]) -> list[float]:
    """Move sorted heights as little as possible until each has a line of text, within the panel."""
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
