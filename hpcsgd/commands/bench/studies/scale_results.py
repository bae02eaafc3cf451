"""Tables, CSV rows and plot of `hpcsgd bench scale`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import FinishedRun
from hpcsgd.commands.bench.studies.trials import deviation, mean_and_deviation
from hpcsgd.commands.report.curves import vertical
from hpcsgd.commands.report.figures import DASHES, PALETTE, Chart, PanelPosition, draw, png, style
from hpcsgd.commands.report.records import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND = 0.15  # opacity of a standard deviation
_NOTES = (
    "Mean and standard deviation over the seeds; the value alone for one seed. Consensus distance: root mean "
    "square distance of the nodes' models from their mean, the model that is tested."
)


@dataclass(frozen=True)
class ScaleTrial:
    """One run of the study: its number of nodes, seed, method and records."""

    nodes: int
    seed: int
    method: str
    finished: FinishedRun

    @property
    def accuracy(self) -> float:
        """Final test accuracy of the consensus model in percent."""
        return 100 * float(self.finished.record.test.accuracy[-1])

    @property
    def distance(self) -> float:
        """Final consensus distance."""
        return float(self.finished.record.test.consensus_distance[-1])


class ScaleStudy:
    """All runs of the study.

    Parameters
    ----------
    trials
        The runs: one per number of nodes, method and seed.
    title
        Data set, length and ranks of the runs, for the tables.
    """

    def __init__(self, trials: Sequence[ScaleTrial], title: str) -> None:
        self.trials, self.title = trials, title
        self.nodes = sorted({trial.nodes for trial in trials})
        self.methods = list(dict.fromkeys(trial.method for trial in trials))

    def accuracies(self, nodes: int, method: str) -> Floats:
        """Final accuracies in percent, (seeds,)."""
        return np.array([trial.accuracy for trial in self._of(nodes, method)])

    def distances(self, nodes: int, method: str) -> Floats:
        """Final consensus distances, (seeds,)."""
        return np.array([trial.distance for trial in self._of(nodes, method)])

    def _of(self, nodes: int, method: str) -> list[ScaleTrial]:
        return [trial for trial in self.trials if (trial.nodes, trial.method) == (nodes, method)]

    def show(self) -> None:
        """Print a table of accuracies and one of consensus distances."""
        header = ["", *(f"{nodes}\nnodes" for nodes in self.nodes)]
        for quantity, values, form in (
            ("test accuracy (%)", self.accuracies, ".1f"),
            ("consensus distance", self.distances, ".2g"),
        ):
            rows = [
                [m, *(mean_and_deviation(values(nodes, m), form) for nodes in self.nodes)]
                for m in self.methods
            ]
            notes = _NOTES if values == self.distances else ""
            output.print_table(f"{quantity}; {self.title}", header, rows, notes)

    def rows(self, environment: output.Row) -> list[output.Row]:
        """Rows of the CSV file, one per run."""
        return [
            {
                "virtual_nodes": trial.nodes,
                "method": trial.method,
                "strategy": str(trial.finished.record.config["strategy"]),
                "learning_rate": float(trial.finished.record.config["learning_rate"]),
                "seed": trial.seed,
                "steps": int(trial.finished.record.test.step[-1]),
                "accuracy": round(trial.accuracy / 100, 6),
                "consensus_distance": round(trial.distance, 6),
                "seconds": round(float(trial.finished.record.test.time[-1]), 3),
                **environment,
            }
            for trial in self.trials
        ]

    def plot(self, folder: Path) -> Path:
        """Draw `scale.png`: mean accuracy against nodes, with a band of one standard deviation."""
        with style():
            from matplotlib.lines import Line2D

            handles = [Line2D([], [], **_line_style(index)) for index in range(len(self.methods))]
            legend = list(zip(handles, self.methods, strict=True))
            return png(draw(Chart("scale", "", [self._panel], legend)), folder)

    def _panel(self, axes: Axes, position: PanelPosition) -> None:
        for index, method in enumerate(self.methods):
            samples = [self.accuracies(nodes, method) for nodes in self.nodes]
            mean, width = (np.array([of(values) for values in samples]) for of in (np.mean, deviation))
            line_style = _line_style(index)
            axes.plot(self.nodes, mean, **line_style)
            band = (mean - width, mean + width)
            axes.fill_between(self.nodes, *band, color=line_style["color"], alpha=_BAND, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.nodes, [str(nodes) for nodes in self.nodes])
        axes.set_xlabel("nodes")
        vertical(axes, position, "test accuracy (%)")


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": "o",
        "markersize": 3,
    }
