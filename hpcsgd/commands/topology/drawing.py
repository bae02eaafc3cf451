"""Drawings of topologies: one panel for each step of a period."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.topology.base import Topology
from hpcsgd.topology.mixing import Edge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The blue of Okabe and Ito (2008).
_LINK = "#0072B2"
_MOST_PANELS, _MOST_COLUMNS = 8, 4
_MOST_NUMBERS = 64
_PANEL = 2.6
_THINNEST, _THICKEST = 0.4, 1.8


def draw(topology: Topology, title: str) -> Figure:
    """Draw the peers and their edges; the width of an edge grows with its weight.

    An arrow points from a peer to the reader of its model. If the period of the topology is longer than 8
    steps the first 8 are drawn. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    panels = min(topology.period, _MOST_PANELS)
    columns = min(panels, _MOST_COLUMNS)
    rows = -(-panels // columns)
    scale = 1.6 if panels == 1 else 1.0
    size = (scale * columns * _PANEL, scale * rows * _PANEL + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    left_out = f" (the first {panels} of {topology.period} steps)" if panels < topology.period else ""
    figure.suptitle(title + left_out)
    thickest = max(_off_diagonal(topology, step).max() for step in range(topology.period)) or 1.0
    for step, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if step < panels:
            _panel(axes, topology, step, (_THICKEST - _THINNEST) / thickest)
            axes.set_title(f"step {step}" if topology.period > 1 else "")
    return figure


def _panel(axes: Axes, topology: Topology, step: int, scale: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    positions = np.array(topology.layout())
    weights = _off_diagonal(topology, step)
    dot = 10 if topology.size <= 20 else 7 if topology.size <= 40 else 5
    for reader, source in np.argwhere(weights if topology.directed else np.triu(weights)):
        bent = 0.12 if topology.directed else 0.25 * _passes_another(positions, (source, reader))
        edge = FancyArrowPatch(
            positions[source],
            positions[reader],
            arrowstyle="-|>" if topology.directed else "-",
            connectionstyle=f"arc3,rad={bent}",
            mutation_scale=7,
            shrinkA=dot / 2,
            shrinkB=dot / 2,
            color=_LINK,
            linewidth=_THINNEST + scale * weights[reader, source],
        )
        axes.add_patch(edge)
    axes.plot(*positions.T, "o", color="white", markeredgecolor=_LINK, markersize=dot, zorder=3)
    if topology.size <= _MOST_NUMBERS:
        for peer, position in enumerate(positions):
            axes.annotate(
                str(peer), position, ha="center", va="center_baseline", fontsize=0.55 * dot, zorder=4
            )
    axes.margins(0.15)
    axes.set_aspect("equal", adjustable="box")


def _off_diagonal(topology: Topology, step: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    matrix = topology.matrix(step)
    return matrix - np.diag(np.diag(matrix))


def _passes_another(positions: np.ndarray[tuple[int, ...], np.dtype[np.float64]], edge: Edge) -> bool:
    """Return whether a straight line would run through a third peer."""
    start, way = positions[edge[0]], positions[edge[1]] - positions[edge[0]]
    offsets = positions - start
    along = offsets @ way / (way @ way)
    beside = np.abs(offsets[:, 0] * way[1] - offsets[:, 1] * way[0])
    return bool(((beside < 1e-9) & (along > 1e-9) & (along < 1 - 1e-9)).any())
