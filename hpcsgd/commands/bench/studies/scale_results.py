"""What `hpcsgd bench scale` shows, writes and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import Finished
from hpcsgd.commands.bench.studies.trials import deviation, spread
from hpcsgd.commands.report.curves import vertical
from hpcsgd.commands.report.figures import DASHES, PALETTE, Chart, Place, draw, png, style
from hpcsgd.commands.report.records import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND = 0.15  # opacity of a standard deviation
_NOTES = (
    "Mean and standard deviation over the seeds; those of one seed are written without. Consensus distance: "
    "root mean square distance of the nodes' models from their mean, which is what is tested."
)


@dataclass(frozen=True)
class Trial:
    """One run: its number of nodes, seed and method, and what came of it."""

    nodes: int
    seed: int
    method: str
    finished: Finished

    @property
    def accuracy(self) -> float:
        """Of the consensus model at the end, in percent."""
        return 100 * float(self.finished.record.test.accuracy[-1])

    @property
    def distance(self) -> float:
        """Of the models from the consensus, at the end."""
        return float(self.finished.record.test.consensus_distance[-1])


class Study:
    """All runs of a study.

    Parameters
    ----------
    trials
        Its runs: for each number of nodes and method one a seed.
    title
        On what they ran.
    """

    def __init__(self, trials: Sequence[Trial], title: str) -> None:
        self.trials, self.title = trials, title
        self.nodes = sorted({trial.nodes for trial in trials})
        self.methods = list(dict.fromkeys(trial.method for trial in trials))

    def accuracies(self, nodes: int, method: str) -> Floats:
        """One a seed, in percent."""
        return np.array([trial.accuracy for trial in self._of(nodes, method)])

    def distances(self, nodes: int, method: str) -> Floats:
        """One a seed."""
        return np.array([trial.distance for trial in self._of(nodes, method)])

    def _of(self, nodes: int, method: str) -> list[Trial]:
        return [trial for trial in self.trials if (trial.nodes, trial.method) == (nodes, method)]

    def show(self) -> None:
        """Print a table of accuracies and one of consensus distances."""
        header = ["", *(f"{nodes}\nnodes" for nodes in self.nodes)]
        for what, values, form in (
            ("test accuracy (%)", self.accuracies, ".1f"),
            ("consensus distance", self.distances, ".2g"),
        ):
            rows = [[m, *(spread(values(nodes, m), form) for nodes in self.nodes)] for m in self.methods]
            notes = _NOTES if values == self.distances else ""
            output.show(f"{what}; {self.title}", header, rows, notes)

    def rows(self, facts: output.Row) -> list[output.Row]:
        """Lines of a CSV file, one a run."""
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
                **facts,
            }
            for trial in self.trials
        ]

    def plot(self, folder: Path) -> Path:
        """Draw `scale.png`: accuracy against nodes, the mean and a band of a standard deviation."""
        with style():
            from matplotlib.lines import Line2D

            handles = [Line2D([], [], **_look(index)) for index in range(len(self.methods))]
            legend = list(zip(handles, self.methods, strict=True))
            return png(draw(Chart("scale", "", [self._panel], legend)), folder)

    def _panel(self, axes: Axes, place: Place) -> None:
        for index, method in enumerate(self.methods):
            found = [self.accuracies(nodes, method) for nodes in self.nodes]
            mean, width = (np.array([of(values) for values in found]) for of in (np.mean, deviation))
            look = _look(index)
            axes.plot(self.nodes, mean, **look)
            band = (mean - width, mean + width)
            axes.fill_between(self.nodes, *band, color=look["color"], alpha=_BAND, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.nodes, [str(nodes) for nodes in self.nodes])
        axes.set_xlabel("nodes")
        vertical(axes, place, "test accuracy (%)")


def _look(index: int) -> dict[str, Any]:
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": "o",
        "markersize": 3,
    }
