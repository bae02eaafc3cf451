"""What `hpcsgd bench async` shows, writes and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcsgd import specs
from hpcsgd.bench import output, trials
from hpcsgd.bench.comparison import Cells, Comparison, Measure
from hpcsgd.bench.trials import goal, or_never, spread
from hpcsgd.report.render import Panel, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The label of a link that nobody waits for.
FAST = "fast"
_BASELINE = "allreduce"
_POINTS = 0.5  # of accuracy that asynchrony may cost
#: LASGD's time to the target over all-reduce's, at most: on a fast link or not, with a slow rank or not.
_LIMITS = {(True, False): 1.05, (True, True): 0.4, (False, False): 0.35}


@dataclass(frozen=True)
class Setting:
    """In what methods are compared: a data set, the label of the link, and whether one rank is slow."""

    data: str
    link: str
    slow: bool

    def __str__(self) -> str:
        return f"{self.data}, {self.link}, {'one slow rank' if self.slow else 'equal ranks'}"

    @property
    def column(self) -> tuple[bool, str, bool]:
        """Its place in a row of panels; sorts."""
        return self.link != FAST, self.link, self.slow


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
        """Share of its time that a rank has waited, mean over the ranks."""
        train = self.finished.record.train
        waited, computed = train.wait_seconds[-1], train.compute_seconds[-1]
        return float(np.mean(waited / (waited + computed)))


class Study(Comparison[Setting, Trial]):
    """All runs of a study.

    Parameters
    ----------
    trials
        Its runs: for each setting and method one a seed.
    targets
        Test loss, by data set.
    """

    name = "async"
    measure = Measure("loss", "test loss", ".2f")
    notes = (
        "Delays are simulated: each rank sleeps for each gradient, before its backward pass begins, so that "
        "no method hides communication behind them within a step. An iteration of methods whose ranks do "
        "not keep step is as many gradients as there are ranks. Times are without evaluation, for which all "
        "ranks meet; when the target is reached is interpolated between two of them. Medians over the seeds; "
        "of accuracy mean ± standard deviation."
    )

    def __init__(self, trials: Sequence[Trial], targets: Mapping[str, float]) -> None:
        super().__init__(trials)
        self._targets = targets
        self._places = sorted({setting.column for setting in self.settings})
        self.columns = len(self._places)
        self._beside: dict[str, Axes] = {}

    def target(self, setting: Setting) -> float:
        return self._targets[setting.data]

    def title(self, setting: Setting) -> str:
        config = self._config(setting)
        where = output.on_nodes(config["world"]["ranks"], config["world"]["nodes"])
        return (
            f"{setting}; simulated delays {config['delays']}; {where}; target loss {self.target(setting):g}"
        )

    def _config(self, setting: Setting) -> Mapping[str, Any]:
        return next(trial for trial in self.trials if trial.setting == setting).finished.record.config

    def quality(self, setting: Setting, method: str) -> Cells:
        ratio = self._ratio(setting, method)
        return {
            "relative to\nallreduce": "" if np.isnan(ratio) else f"{ratio:.2f}",
            "final\naccuracy (%)": spread(self._percent(setting, method), ".1f"),
            "waiting\n(%)": f"{100 * np.median([trial.waiting for trial in self.of(setting, method)]):.0f}",
        }

    def _ratio(self, setting: Setting, method: str) -> float:
        """Of the times to the target to that of all-reduce; not a number where there is none."""
        if not self.of(setting, _BASELINE):
            return np.nan
        times = [self.numbers(setting, m).seconds_to_target for m in (method, _BASELINE)]
        return times[0] / times[1] if np.isfinite(times).all() else np.nan

    def _percent(self, setting: Setting, method: str) -> list[float]:
        """Final accuracies, one a seed."""
        return [100 * trial.accuracy for trial in self.of(setting, method)]

    def goals(self) -> list[str]:
        """The goals of LASGD beside what was measured, where it and all-reduce have run."""
        told = []
        for setting in self.settings:
            method = next((m for m in self.methods if _is_adaptive(m) and self.of(setting, m)), None)
            if method and self.of(setting, _BASELINE):
                told += [*self._time(setting, method), self._accuracy(setting, method)]
        return told

    def _time(self, setting: Setting, method: str) -> list[str]:
        limit = _LIMITS.get((setting.link == FAST, setting.slow))
        if limit is None:
            return []
        mine, base = (self.numbers(setting, m).seconds_to_target for m in (method, _BASELINE))
        ratio = self._ratio(setting, method)
        times = f"{or_never(mine, '.2f s')} to {or_never(base, '.2f s')}"
        what = f"{method} at loss {self.target(setting):g} in at most {limit:.2f} of {_BASELINE}'s time"
        return [goal(setting, what, times if np.isnan(ratio) else f"{ratio:.2f}, {times}", ratio <= limit)]

    def _accuracy(self, setting: Setting, method: str) -> str:
        mine, base = (float(np.mean(self._percent(setting, m))) for m in (method, _BASELINE))
        what = f"final accuracy of {method} at most {_POINTS} points below {_BASELINE}'s"
        return goal(setting, what, f"{mine:.2f} to {base:.2f} %", base - mine <= _POINTS)

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
            **facts,
            "ranks": config["world"]["ranks"],
            "nodes": config["world"]["nodes"],
        }

    def panels(self) -> list[Panel]:
        """A row for each data set, a column for each link with and without a slow rank."""
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


def _is_adaptive(method: str) -> bool:
    """Whether it is LASGD that finds its period by itself, of which the goals speak."""
    name, options = specs.parse(method)
    return name == "lasgd" and options.get("period", "auto") == "auto"
