"""Results of the studies with a launch per link: the time in which each method reaches a test loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.output import Column
from hpcsgd.commands.bench.studies.comparison import mean_and_deviation
from hpcsgd.commands.bench.studies.time_to_target import Metric, Runs, TargetTrial, TimeToTarget
from hpcsgd.commands.bench.studies.workloads import WORKLOADS, StudyCondition, Workload
from hpcsgd.commands.report.figures import Panel, PanelPosition

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TimeToLossTrial(TargetTrial[StudyCondition]):
    """One run with a target test loss."""

    @property
    def reached(self) -> tuple[float, float]:
        """Iterations and seconds to the target, interpolated between evaluations; infinite if not reached.

        The time of the first evaluation, if that is below the target already.
        """
        loss = self.test.loss
        below = np.flatnonzero(loss <= self.target)
        if not len(below):
            return np.inf, np.inf
        after = below[0]
        before = after - 1 if after and np.isfinite(loss[after - 1]) else after
        around = [after, before]
        steps, times = (
            np.interp(self.target, loss[around], c[around]) for c in (self.test.step, self.test.time)
        )
        return float(steps), float(times)

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings of the run."""
        return self.finished.record.config

    @property
    def waiting(self) -> float:
        """Share of a worker's time spent waiting, mean over the workers."""
        train = self.finished.record.train
        waited, computed = (c[-1][: self.workers] for c in (train.wait_seconds, train.compute_seconds))
        return float(np.mean(waited / (waited + computed)))

    @property
    def server_bytes(self) -> int:
        """Bytes of pushes to the servers and of replies, which have equal size, since the first step."""
        return 2 * int(self.test.bytes_sent[-1][self.workers :].sum())


LossRuns = Runs[StudyCondition, TimeToLossTrial]


def _percents(runs: LossRuns) -> list[float]:
    return [100 * trial.accuracy for trial in runs.trials]


class TimeToLossStudy(TimeToTarget[StudyCondition, TimeToLossTrial]):
    """All runs of a study; a subclass defines its conditions."""

    slow_ranks: int  # in half of the conditions
    baseline: str  # the method to which the times of the others are compared
    workloads: Mapping[str, Workload] = WORKLOADS  # of each data set
    metric = Metric("loss", "test loss", ".2f")
    notes = (
        "Delays are simulated: each rank sleeps for each gradient, before its backward pass, so that no "
        "method overlaps communication with them within a step. An iteration of an asynchronous method is "
        "one gradient per worker on average. Times exclude evaluation, for which all ranks synchronise; the "
        "time to the target is interpolated between evaluations. Medians over the seeds; accuracy: mean ± "
        "standard deviation."
    )

    def __init__(self, trials: Sequence[TimeToLossTrial]) -> None:
        super().__init__(trials)
        self._grid = sorted({condition.column for condition in self.conditions})
        self.panels_in_row = len(self._grid)
        self._previous_axes: dict[str, Axes] = {}

    def title(self, condition: StudyCondition) -> str:
        runs = [trial for trial in self.trials if trial.condition == condition]
        config, seeds = runs[0].config, len({run.seed for run in runs})
        workers = output.count_on_nodes(runs[0].workers, config["world"]["nodes"], "worker")
        delays, target = f"simulated delays {config['delays']}", f"target loss {runs[0].target:g}"
        return f"{condition}; {delays}; {workers}; {target}; {seeds} seed{'s' if seeds > 1 else ''}"

    def further_columns(self) -> list[Column[LossRuns]]:
        relative: Column[LossRuns] = Column(self.ratio, heading=f"relative to\n{self.baseline}", form=".2f")
        return [relative, *self.final_columns()]

    def final_columns(self) -> list[Column[LossRuns]]:
        """Columns about whole runs."""
        return [
            Column(_percents, heading="final\naccuracy (%)", form=mean_and_deviation),
            Column(lambda r: 100 * r.median(lambda t: t.waiting), heading="waiting\n(%)", form=".0f"),
        ]

    def ratio(self, runs: LossRuns) -> float:
        """Ratio of the time to the target to the baseline's; NaN if either did not reach it."""
        baseline = self.runs(runs.condition, self.baseline)
        if not baseline.trials:
            return np.nan
        times = [runs.reached[1], baseline.reached[1]]
        return times[0] / times[1] if np.isfinite(times).all() else np.nan

    def publish(self, out: Path, environment: output.Row) -> None:
        """Print the tables; write the CSV file, the figure, and the tables as Markdown into `out`."""
        super().publish(out, environment)
        path = out / f"{self.name}.md"
        path.write_text("\n".join(map(self.markdown, dict.fromkeys(s.data for s in self.conditions))))
        print(path, flush=True)

    def markdown(self, data: str) -> str:
        """A table of a data set with a row per method: times under each condition, then the final cells."""
        ran = [trial.method for trial in self.trials if trial.condition.data == data]
        rows = {method: self._row(data, method) for method in dict.fromkeys(ran)}
        header = [data, *next(iter(rows.values()))]
        lines = [header, ["---"] * len(header), *([method, *row.values()] for method, row in rows.items())]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _row(self, data: str, method: str) -> dict[str, str]:
        found = [self.runs(condition, method) for condition in self.conditions if condition.data == data]
        final = {
            str(column.heading).replace("\n", " "): ", ".join(
                column.text(runs) for runs in found if runs.trials
            )
            for column in self.final_columns()
        }
        return {runs.condition.cluster: self._time(runs) for runs in found} | final

    def _time(self, runs: LossRuns) -> str:
        if not runs.trials:
            return ""
        ratio, seconds = self.ratio(runs), output.or_never(runs.reached[1], ".3g s")
        return seconds if np.isnan(ratio) or runs.method == self.baseline else f"{seconds} ({ratio:.2f})"

    def columns(self) -> list[Column[TimeToLossTrial]]:
        return [
            Column(lambda t: t.condition.data, "data"),
            Column(lambda t: t.condition.link, "link"),
            Column(lambda t: t.config["delays"], "simulated_delays"),
            *super().columns(),
            Column(lambda t: float(t.test.loss[-1]), "loss", digits=6),
            Column(lambda t: t.waiting, "waiting"),
            Column(lambda t: t.server_bytes, "server_bytes"),
            Column(lambda t: t.config["world"]["ranks"], "ranks"),
            Column(lambda t: t.config["world"]["nodes"], "nodes"),
        ]

    def panels(self) -> list[Panel]:
        """A row per data set, a column per link with and without slow ranks."""
        self._previous_axes = {}
        return [
            partial(self.panel, condition=StudyCondition(data, link, slow_ranks))
            for data in dict.fromkeys(condition.data for condition in self.conditions)
            for _, link, slow_ranks in self._grid
        ]

    def panel(self, axes: Axes, position: PanelPosition, *, condition: StudyCondition) -> None:
        """Draw a condition; its panel stays empty if nothing has run under it."""
        figure, cell = axes.get_figure(), axes.get_subplotspec()
        assert figure is not None and cell is not None, "panels are laid out in a grid"
        # All panels of a figure share their vertical axis, but the losses of data sets differ.
        axes.remove()
        if condition not in self.conditions:
            return
        left = self._previous_axes.get(condition.data)
        new = self._previous_axes[condition.data] = figure.add_subplot(cell, sharey=left)
        new.tick_params(labelleft=left is None)
        super().panel(new, replace(position, first=left is None), condition=condition)
