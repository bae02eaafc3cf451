"""Figures of runs: accuracy and loss against time, epochs and bytes, and the time per step of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.commands.report.curves import Curve, draw_curves, spans_decades, vertical
from hpcsgd.commands.report.figures import (
    DASHES,
    PALETTE,
    Chart,
    Dashes,
    Panel,
    PanelPosition,
    draw,
    short,
    style,
)
from hpcsgd.commands.report.labels import labels
from hpcsgd.commands.report.records import Floats, RunRecord
from hpcsgd.commands.report.summary import moved_bytes, uses_mostly_shared_memory
from hpcsgd.commands.report.units import byte_unit, significant, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COMPUTE, _WAIT = PALETTE[0], PALETTE[4]
_MAX_SEPARATE_BARS = 24


@dataclass(frozen=True)
class _Cost:
    """A horizontal axis: its label, and the coordinates of each run's evaluations."""

    name: str
    values: list[Floats]


def figures(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draw the figures of runs; the label of a figure is the name of its file.

    Parameters
    ----------
    runs
        The runs, at least one.

    Raises
    ------
    HpcsgdError
        matplotlib is not installed.
    """
    return [draw(chart) for chart in charts(runs)]


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The charts of test accuracy, test loss, and time per step on each rank."""
    with style():
        from matplotlib.lines import Line2D

        names, line_styles = labels(runs), [_line_style(index) for index in range(len(runs))]
        legend = [
            (Line2D([], [], color=color, linestyle=dashes), name)
            for (color, dashes), name in zip(line_styles, names, strict=True)
        ]
        accuracy = [100 * run.test.accuracy for run in runs]
        loss = [run.test.loss for run in runs]
        accuracies = partial(
            draw_curves, ylabel="test accuracy (%)", log=False, format_value=lambda value: f"{value:.2f}"
        )
        losses = partial(
            draw_curves,
            ylabel="test loss",
            log=spans_decades(loss),
            format_value=lambda value: significant(value, 3),
        )
        panels: dict[str, list[Panel]] = {"accuracy": [], "loss": []}
        for cost in _costs(runs):
            for name, panel, values in (("accuracy", accuracies, accuracy), ("loss", losses, loss)):
                curves = [
                    Curve(x, y, *line_style)
                    for x, y, line_style in zip(cost.values, values, line_styles, strict=True)
                ]
                panels[name].append(partial(panel, xlabel=cost.name, curves=curves))
        drawn = [Chart(name, f"Test {name}", panels[name], legend) for name in panels]
        return [*drawn, *_ranks_chart(runs, names)]


def _line_style(index: int) -> tuple[str, Dashes]:
    return PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)]


def _costs(runs: Sequence[RunRecord]) -> list[_Cost]:
    times = [run.test.time for run in runs]
    unit = time_unit(_largest(times))
    costs = [
        _Cost(f"wall-clock time ({unit.symbol})", [time / unit.size for time in times]),
        _Cost("epochs", [run.test.epoch for run in runs]),
    ]
    through_memory = [uses_mostly_shared_memory(run) for run in runs]
    if all(through_memory):
        name = "bytes per rank through\nnode-shared memory ({})"
        moved = [moved_bytes(run, run.test).mean(axis=1) for run in runs]
    else:
        name = "bytes sent per rank ({})" + "\nruns that send none are not drawn" * any(through_memory)
        # A run with zero bytes would be a line on the vertical axis.
        moved = [
            np.full(len(run.test), np.nan) if none else moved_bytes(run, run.test).mean(axis=1)
            for run, none in zip(runs, through_memory, strict=True)
        ]
    if (most := _largest(moved)) > 0:
        size = byte_unit(most)
        costs.append(_Cost(name.format(size.symbol), [values / size.size for values in moved]))
    return costs


def _ranks_chart(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    from matplotlib.patches import Patch

    shown = [(run, name) for run, name in zip(runs, names, strict=True) if len(run.train)]
    if not shown:
        return []
    per_step = [_per_step(run) for run, _ in shown]
    longest = max(float(times.sum(axis=0).max()) for times in per_step)
    unit = time_unit(longest)
    panels = [
        partial(
            _ranks,
            times=times / unit.size,
            top=1.05 * longest / unit.size,
            unit=unit.symbol,
            title=name,
        )
        for times, (_, name) in zip(per_step, shown, strict=True)
    ]
    legend = [(Patch(color=_COMPUTE), "computing"), (Patch(color=_WAIT), "waiting")]
    return [Chart("ranks", "Time per step on each rank", panels, legend)]


def _per_step(run: RunRecord) -> Floats:
    """Mean compute and wait seconds per step, float64 of shape (2, ranks)."""
    steps = max(int(run.train.step[-1]), 1)
    return np.stack([run.train.compute_seconds[-1], run.train.wait_seconds[-1]]) / steps


def _ranks(axes: Axes, position: PanelPosition, *, times: Floats, top: float, unit: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    compute, wait = times
    ranks = np.arange(len(compute))
    width = 0.7 if len(ranks) <= _MAX_SEPARATE_BARS else 1.0
    axes.bar(ranks, compute, width, color=_COMPUTE)
    axes.bar(ranks, wait, width, bottom=compute, color=_WAIT)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(-0.6, len(ranks) - 0.4)
    axes.set_ylim(0, top or 1)
    axes.set_xlabel("rank")
    axes.set_title(short(title))
    vertical(axes, position, f"mean time per step ({unit})")


def _largest(arrays: Sequence[Floats]) -> float:
    joined = np.concatenate(arrays)
    finite = joined[np.isfinite(joined)]
    return float(finite.max()) if finite.size else 0.0
