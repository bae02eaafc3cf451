"""`hpcsgd bench scale`: accuracy of gossip methods against the number of virtual nodes, on skewed data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.devices import open_world
from hpcsgd.commands.bench.options import ScaleOptions
from hpcsgd.commands.bench.output import Column, Results
from hpcsgd.commands.bench.studies.comparison import Comparison, Trial, deviation, mean_and_deviation
from hpcsgd.commands.bench.studies.runner import run_plan, settings_of, with_option
from hpcsgd.commands.report.curves import vertical
from hpcsgd.commands.report.figures import Panel, PanelPosition
from hpcsgd.commands.train.settings import Settings
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.strategies import STRATEGIES
from hpcsgd.strategies import build as build_strategy
from hpcsgd.training.data import load
from hpcsgd.training.data.base import Source
from hpcsgd.training.data.partition import partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

_BAND = 0.15  # opacity of a standard deviation
_NOTES = (
    "Mean and standard deviation over the seeds; the value alone for one seed. Consensus distance: root mean "
    "square distance of the nodes' models from their mean, the model that is tested."
)


class ScaleTrial(Trial[int]):
    """One run, whose condition is its number of virtual nodes."""

    @property
    def percent(self) -> float:
        """Final test accuracy of the consensus model in percent."""
        return 100 * self.accuracy

    @property
    def distance(self) -> float:
        """Final consensus distance."""
        return float(self.test.consensus_distance[-1])


class ScaleStudy(Comparison[int, ScaleTrial]):
    """All runs of the study; `title` is their data set, length and ranks, for the tables."""

    name = "scale"
    panels_in_row = 1

    def __init__(self, trials: Sequence[ScaleTrial], title: str) -> None:
        super().__init__(trials)
        self.title = title
        self.conditions.sort()
        for line_style in self.line_styles.values():
            line_style |= {"marker": "o", "markersize": 3}

    def tables(self) -> Iterator[Results[str]]:
        """A table of accuracies and one of consensus distances."""
        yield self._table("test accuracy (%)", lambda trial: trial.percent, ".1f", "")
        yield self._table("consensus distance", lambda trial: trial.distance, ".2g", _NOTES)

    def _table(
        self, quantity: str, value: Callable[[ScaleTrial], float], form: str, notes: str
    ) -> Results[str]:
        def cell(nodes: int, method: str) -> str:
            return mean_and_deviation([value(trial) for trial in self.trials_of(nodes, method)], form)

        methods: Column[str] = Column(lambda method: method, heading="")
        columns = [Column(partial(cell, nodes), heading=f"{nodes}\nnodes") for nodes in self.conditions]
        return Results([methods, *columns], self.methods, f"{quantity}; {self.title}", notes)

    def columns(self) -> list[Column[ScaleTrial]]:
        return [
            Column(lambda t: t.condition, "virtual_nodes"),
            Column(lambda t: t.method, "method"),
            Column(lambda t: t.finished.record.config["strategy"], "strategy"),
            Column(lambda t: t.finished.record.config["learning_rate"], "learning_rate", digits=9),
            Column(lambda t: t.seed, "seed"),
            Column(lambda t: t.iterations, "steps"),
            Column(lambda t: t.accuracy, "accuracy", digits=6),
            Column(lambda t: t.distance, "consensus_distance", digits=6),
            Column(lambda t: float(t.test.time[-1]), "seconds", digits=3),
        ]

    def panels(self) -> list[Panel]:
        """Mean accuracy against nodes, with a band of one standard deviation."""
        return [self._panel]

    def _panel(self, axes: Axes, position: PanelPosition) -> None:
        for method, line_style in self.line_styles.items():
            samples = [[t.percent for t in self.trials_of(nodes, method)] for nodes in self.conditions]
            mean, width = (np.array([of(values) for values in samples]) for of in (np.mean, deviation))
            axes.plot(self.conditions, mean, **line_style)
            band = (mean - width, mean + width)
            axes.fill_between(self.conditions, *band, color=line_style["color"], alpha=_BAND, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.conditions, [str(nodes) for nodes in self.conditions])
        axes.set_xlabel("nodes")
        vertical(axes, position, "test accuracy (%)")


def main(options: ScaleOptions) -> None:
    """Train with increasing numbers of virtual nodes on the ranks of this job; rank 0 prints a table.

    In every iteration each active node takes a batch of its own samples, and reshuffles them when the node
    with the fewest samples has used all of its own (`--uneven stop`). `out` gets the runs, `scale.csv`, and
    `scale.png`, accuracy against nodes. The seed sets the model, the skew and the order of the samples.
    """
    names = [registry.parse(method)[0] for method in options.methods]
    active = _by_key("active", options.active, list(map(str, options.nodes)))
    rates = _by_key("learning_rate", options.learning_rate, names)
    grid = [(n, seed, m) for n in options.nodes for seed in range(options.seeds) for m in options.methods]
    source = load(options.data).train
    plan = []
    for count, seed, method in grid:
        settings = settings_of(
            options,
            virtual_nodes=count,
            seed=seed,
            strategy=with_option(STRATEGIES, method, "active", active[str(count)]),
            learning_rate=rates[registry.parse(method)[0]],
            uneven="stop",
            evaluate_every=0.0,
            checkpoint_every=0.0,
            log_every=options.steps,
            threads=1,
        )
        plan.append((f"{count}-{seed}-{method}", _with_length(options.steps, settings, source)))
    with open_world(path=options.out / f"{ScaleStudy.name}.csv") as world:
        finished = run_plan(world, options.out, plan)
        if world.rank == 0:
            trials = [ScaleTrial(*point, run) for point, run in zip(grid, finished, strict=True)]
            _check_length(trials, options.steps)
            length = f"{options.steps} iterations of batches of {options.batch}, {options.seeds} seeds"
            title = f"{options.data}, Dirichlet({options.alpha:g}), {length}, virtual nodes on "
            title += output.describe_ranks(world)
            ScaleStudy(trials, title).publish(options.out, output.environment(world))


def _by_key(option: str, values: Mapping[str, T], keys: Sequence[str]) -> dict[str, T]:
    """Return the value of each key, or that of all."""
    keys = list(dict.fromkeys(keys))
    if "" not in values and (missing := [key for key in keys if key not in values]):
        raise BadOption(
            f"option {option} lacks {', '.join(missing)}",
            expected="one number, or for example " + ",".join(f"{key}=2" for key in keys),
            got=dict(values),
        )
    return {key: values[key] if key in values else values[""] for key in keys}


def _with_length(steps: int, settings: Settings, source: Source) -> Settings:
    """Set the epochs to `steps` steps: an epoch is the smallest shard, or if asynchronous the largest."""
    nodes = settings.virtual_nodes or 1
    shards = partition(source.labels, len(source), nodes, settings.alpha, settings.seed, 0)
    batches = [-(-len(shard) // settings.batch) for shard in shards]
    synchronous = build_strategy(settings.strategy).synchronous
    # A run takes as many steps as these epochs begin.
    return replace(settings, epochs=(steps - 0.5) / (min(batches) if synchronous else max(batches)))


def _check_length(trials: Sequence[ScaleTrial], steps: int) -> None:
    for trial in trials:
        if trial.iterations != steps:
            error = f"{trial.method} took a wrong number of steps"
            raise HpcsgdError(error, expected=steps, got=trial.iterations)
