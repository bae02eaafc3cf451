"""Results of the studies with a launch per link: the time in which each method reaches a test loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies import trials
from hpcsgd.commands.bench.studies.comparison import Cells, Comparison, Metric
from hpcsgd.commands.bench.studies.trials import goal_line, mean_and_deviation, or_never
from hpcsgd.commands.bench.studies.workloads import WORKLOADS, StudyCondition, Workload
from hpcsgd.commands.report.figures import Panel, PanelPosition

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TimeToLossTrial(trials.Trial[StudyCondition]):
    """One run under a condition, with a target test loss."""

    def reached(self, target: float) -> tuple[float, float]:
        """Iterations and seconds to the target, interpolated between evaluations; infinite if not reached.

        The time of the first evaluation, if that is below the target already.
        """
        loss = self.test.loss
        below = np.flatnonzero(loss <= target)
        if not len(below):
            return np.inf, np.inf
        after = below[0]
        before = after - 1 if after and np.isfinite(loss[after - 1]) else after
        around = [after, before]
        steps, times = (np.interp(target, loss[around], c[around]) for c in (self.test.step, self.test.time))
        return float(steps), float(times)

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


class TimeToLossStudy(Comparison[StudyCondition, TimeToLossTrial]):
    """All runs of a study; a subclass defines its goals.

    Parameters
    ----------
    trials
        The runs: one per condition, method and seed.
    targets
        Target test loss by data set.

    Attributes
    ----------
    slow_ranks
        Number of slow ranks in half of the conditions.
    baseline
        The method to which the times of the others are compared.
    workloads
        The workload of each data set.
    """

    metric = Metric("loss", "test loss", ".2f")
    notes = (
        "Delays are simulated: each rank sleeps for each gradient, before its backward pass, so that no "
        "method overlaps communication with them within a step. An iteration of an asynchronous method is "
        "one gradient per worker on average. Times exclude evaluation, for which all ranks synchronise; the "
        "time to the target is interpolated between evaluations. Medians over the seeds; accuracy: mean ± "
        "standard deviation."
    )
    slow_ranks: int
    baseline: str
    workloads: Mapping[str, Workload] = WORKLOADS

    def __init__(self, trials: Sequence[TimeToLossTrial], targets: Mapping[str, float]) -> None:
        super().__init__(trials)
        self._targets = targets
        self._columns = sorted({condition.column for condition in self.conditions})
        self.columns = len(self._columns)
        self._previous_axes: dict[str, Axes] = {}

    def target(self, condition: StudyCondition) -> float:
        return self._targets[condition.data]

    def title(self, condition: StudyCondition) -> str:
        runs = [trial for trial in self.trials if trial.condition == condition]
        config, seeds = runs[0].finished.record.config, len({run.seed for run in runs})
        workers = output.count_on_nodes(runs[0].workers, config["world"]["nodes"], "worker")
        delays, target = f"simulated delays {config['delays']}", f"target loss {self.target(condition):g}"
        return f"{condition}; {delays}; {workers}; {target}; {seeds} seed{'s' if seeds > 1 else ''}"

    def quality_cells(self, condition: StudyCondition, method: str) -> Cells:
        ratio = self.ratio(condition, method)
        return {
            f"relative to\n{self.baseline}": "" if np.isnan(ratio) else f"{ratio:.2f}",
            **self.final_cells(condition, method),
        }

    def final_cells(self, condition: StudyCondition, method: str) -> Cells:
        """Cells about the whole run."""
        waiting = np.median([trial.waiting for trial in self.trials_of(condition, method)])
        return {
            "final\naccuracy (%)": mean_and_deviation(self.accuracies(condition, method), ".1f"),
            "waiting\n(%)": f"{100 * waiting:.0f}",
        }

    def ratio(self, condition: StudyCondition, method: str) -> float:
        """Ratio of the time to the target to the baseline's; NaN if either did not reach it."""
        if not self.trials_of(condition, self.baseline):
            return np.nan
        times = [self.medians(condition, m).seconds_to_target for m in (method, self.baseline)]
        return times[0] / times[1] if np.isfinite(times).all() else np.nan

    def accuracies(self, condition: StudyCondition, method: str) -> list[float]:
        """Final accuracies in percent, one per seed."""
        return [100 * trial.accuracy for trial in self.trials_of(condition, method)]

    def time_goal(self, condition: StudyCondition, method: str, limit: float) -> str:
        """The goal to reach the target in `limit` times the baseline's time, and the measured ratio."""
        seconds, baseline = (self.medians(condition, m).seconds_to_target for m in (method, self.baseline))
        ratio = self.ratio(condition, method)
        times = f"{or_never(seconds, '.2f s')} to {or_never(baseline, '.2f s')}"
        measured = times if np.isnan(ratio) else f"{ratio:.2f}, {times}"
        target, baseline_time = f"{self.target(condition):g}", f"{limit:.2f} of {self.baseline}'s time"
        goal = f"{method} reaches loss {target} in at most {baseline_time}"
        return goal_line(condition, goal, measured, ratio <= limit)

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

    def _row(self, data: str, method: str) -> Cells:
        conditions = [condition for condition in self.conditions if condition.data == data]
        final = [self.final_cells(c, method) for c in conditions if self.trials_of(c, method)]
        return {
            **{condition.cluster: self._time(condition, method) for condition in conditions},
            **{name.replace("\n", " "): ", ".join(cells[name] for cells in final) for name in final[0]},
        }

    def _time(self, condition: StudyCondition, method: str) -> str:
        if not self.trials_of(condition, method):
            return ""
        ratio = self.ratio(condition, method)
        seconds = or_never(self.medians(condition, method).seconds_to_target, ".3g s")
        return seconds if np.isnan(ratio) or method == self.baseline else f"{seconds} ({ratio:.2f})"

    def rows(self, environment: output.Row) -> list[output.Row]:
        """Rows of the CSV file, one per run."""
        return [self._line(trial, environment) for trial in self.trials]

    def _line(self, trial: TimeToLossTrial, environment: output.Row) -> output.Row:
        condition, config = trial.condition, trial.finished.record.config
        # The host is left out, because it differs between launches.
        environment = {key: value for key, value in environment.items() if key != "host"}
        return {
            "data": condition.data,
            "link": condition.link,
            "simulated_delays": config["delays"],
            **trial.row(self.target(condition)),
            "loss": round(float(trial.test.loss[-1]), 6),
            "waiting": round(trial.waiting, 4),
            "server_bytes": trial.server_bytes,
            **environment,
            "ranks": config["world"]["ranks"],
            "nodes": config["world"]["nodes"],
        }

    def panels(self) -> list[Panel]:
        """A row per data set, a column per link with and without slow ranks."""
        self._previous_axes = {}
        return [
            partial(self.panel, condition=StudyCondition(data, link, slow_ranks))
            for data in dict.fromkeys(condition.data for condition in self.conditions)
            for _, link, slow_ranks in self._columns
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
