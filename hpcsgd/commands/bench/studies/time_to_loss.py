"""What studies over several links show: when each method comes to a test loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies import trials
from hpcsgd.commands.bench.studies.comparison import Cells, Comparison, Measure
from hpcsgd.commands.bench.studies.trials import goal, or_never, spread
from hpcsgd.commands.bench.studies.workloads import WORKLOADS, Setting, Workload
from hpcsgd.commands.report.figures import Panel, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Trial(trials.Trial[Setting]):
    """One run in a setting; its target is a test loss."""

    def reached(self, target: float) -> tuple[float, float]:
        """Where a line through the two evaluations around it is there; at the first one at the latest."""
        loss = self.test.loss
        found = np.flatnonzero(loss <= target)
        if not len(found):
            return np.inf, np.inf
        here = found[0]
        before = here - 1 if here and np.isfinite(loss[here - 1]) else here
        around = [here, before]
        steps, times = (np.interp(target, loss[around], c[around]) for c in (self.test.step, self.test.time))
        return float(steps), float(times)

    @property
    def waiting(self) -> float:
        """Share of its time that a worker has waited, mean over the workers."""
        train = self.finished.record.train
        waited, computed = (c[-1][: self.workers] for c in (train.wait_seconds, train.compute_seconds))
        return float(np.mean(waited / (waited + computed)))

    @property
    def server_bytes(self) -> int:
        """Pushes to the servers and their answers, which are as long, from the first step on."""
        return 2 * int(self.test.bytes_sent[-1][self.workers :].sum())


class Study(Comparison[Setting, Trial]):
    """All runs of a study; a subclass says what its goals are.

    Parameters
    ----------
    trials
        Its runs: for each setting and method one a seed.
    targets
        Test loss, by data set.

    Attributes
    ----------
    slow
        How many ranks are slow in half of the settings.
    baseline
        The method to whose time that of the others is compared.
    workloads
        What is trained, by data set.
    """

    measure = Measure("loss", "test loss", ".2f")
    notes = (
        "Delays are simulated: each rank sleeps for each gradient, before its backward pass begins, so that "
        "no method hides communication behind them within a step. An iteration of methods whose ranks do "
        "not keep step is as many gradients as there are workers. Times are without evaluation, for which "
        "all ranks meet; when the target is reached is interpolated between two of them. Medians over the "
        "seeds; of accuracy mean ± standard deviation."
    )
    slow: int
    baseline: str
    workloads: Mapping[str, Workload] = WORKLOADS

    def __init__(self, trials: Sequence[Trial], targets: Mapping[str, float]) -> None:
        super().__init__(trials)
        self._targets = targets
        self._places = sorted({setting.column for setting in self.settings})
        self.columns = len(self._places)
        self._beside: dict[str, Axes] = {}

    def target(self, setting: Setting) -> float:
        return self._targets[setting.data]

    def title(self, setting: Setting) -> str:
        runs = [trial for trial in self.trials if trial.setting == setting]
        config, seeds = runs[0].finished.record.config, len({run.seed for run in runs})
        where = output.on_nodes(runs[0].workers, config["world"]["nodes"], "worker")
        delays, target = f"simulated delays {config['delays']}", f"target loss {self.target(setting):g}"
        return f"{setting}; {delays}; {where}; {target}; {seeds} seed{'s' if seeds > 1 else ''}"

    def quality(self, setting: Setting, method: str) -> Cells:
        ratio = self.ratio(setting, method)
        return {
            f"relative to\n{self.baseline}": "" if np.isnan(ratio) else f"{ratio:.2f}",
            **self.besides(setting, method),
        }

    def besides(self, setting: Setting, method: str) -> Cells:
        """What there is to say besides when the target is reached."""
        return {
            "final\naccuracy (%)": spread(self.percent(setting, method), ".1f"),
            "waiting\n(%)": f"{100 * np.median([trial.waiting for trial in self.of(setting, method)]):.0f}",
        }

    def ratio(self, setting: Setting, method: str) -> float:
        """Of the times to the target to that of the baseline; not a number where there is none."""
        if not self.of(setting, self.baseline):
            return np.nan
        times = [self.numbers(setting, m).seconds_to_target for m in (method, self.baseline)]
        return times[0] / times[1] if np.isfinite(times).all() else np.nan

    def percent(self, setting: Setting, method: str) -> list[float]:
        """Final accuracies, one a seed."""
        return [100 * trial.accuracy for trial in self.of(setting, method)]

    def sooner(self, setting: Setting, method: str, limit: float) -> str:
        """The goal to be at the target within a share of the baseline's time, beside what was measured."""
        mine, base = (self.numbers(setting, m).seconds_to_target for m in (method, self.baseline))
        ratio = self.ratio(setting, method)
        times = f"{or_never(mine, '.2f s')} to {or_never(base, '.2f s')}"
        what = f"{method} at loss {self.target(setting):g} in at most {limit:.2f} of {self.baseline}'s time"
        return goal(setting, what, times if np.isnan(ratio) else f"{ratio:.2f}, {times}", ratio <= limit)

    def publish(self, out: Path, facts: output.Row) -> None:
        """Show the study; write its CSV file, its figure, and its tables in Markdown."""
        super().publish(out, facts)
        path = out / f"{self.name}.md"
        path.write_text("\n".join(map(self.markdown, dict.fromkeys(s.data for s in self.settings))))
        print(path, flush=True)

    def markdown(self, data: str) -> str:
        """A table of a data set, a row a method: its times in each setting, then what there is besides."""
        ran = [trial.method for trial in self.trials if trial.setting.data == data]
        rows = {method: self._row(data, method) for method in dict.fromkeys(ran)}
        header = [data, *next(iter(rows.values()))]
        lines = [header, ["---"] * len(header), *([method, *row.values()] for method, row in rows.items())]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _row(self, data: str, method: str) -> Cells:
        settings = [setting for setting in self.settings if setting.data == data]
        besides = [self.besides(setting, method) for setting in settings if self.of(setting, method)]
        return {
            **{setting.where: self._time(setting, method) for setting in settings},
            **{name.replace("\n", " "): ", ".join(cells[name] for cells in besides) for name in besides[0]},
        }

    def _time(self, setting: Setting, method: str) -> str:
        if not self.of(setting, method):
            return ""
        ratio = self.ratio(setting, method)
        seconds = or_never(self.numbers(setting, method).seconds_to_target, ".3g s")
        return seconds if np.isnan(ratio) or method == self.baseline else f"{seconds} ({ratio:.2f})"

    def rows(self, facts: output.Row) -> list[output.Row]:
        """Lines of a CSV file, one a run."""
        return [self._line(trial, facts) for trial in self.trials]

    def _line(self, trial: Trial, facts: output.Row) -> output.Row:
        setting, config = trial.setting, trial.finished.record.config
        facts = {key: value for key, value in facts.items() if key != "host"}  # each launch has its own
        return {
            "data": setting.data,
            "link": setting.link,
            "simulated_delays": config["delays"],
            **trial.row(self.target(setting)),
            "loss": round(float(trial.test.loss[-1]), 6),
            "waiting": round(trial.waiting, 4),
            "server_bytes": trial.server_bytes,
            **facts,
            "ranks": config["world"]["ranks"],
            "nodes": config["world"]["nodes"],
        }

    def panels(self) -> list[Panel]:
        """A row for each data set, a column for each link with and without slow ranks."""
        self._beside = {}
        return [
            partial(self.panel, setting=Setting(data, link, slow))
            for data in dict.fromkeys(setting.data for setting in self.settings)
            for _, link, slow in self._places
        ]

    def panel(self, axes: Axes, place: Place, *, setting: Setting) -> None:
        """Draw a setting, or leave its place empty where nothing has run in it."""
        figure, spot = axes.get_figure(), axes.get_subplotspec()
        assert figure is not None and spot is not None, "panels are laid out in a grid"
        # All panels of a figure share their vertical axis, but each data set has losses of its own.
        axes.remove()
        if setting not in self.settings:
            return
        beside = self._beside.get(setting.data)
        own = self._beside[setting.data] = figure.add_subplot(spot, sharey=beside)
        own.tick_params(labelleft=beside is None)
        super().panel(own, replace(place, first=beside is None), setting=setting)
