"""`hpcsgd bench straggler`: the cost of slow ranks to each method, with simulated delays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.devices import open_world
from hpcsgd.commands.bench.options import StragglerOptions
from hpcsgd.commands.bench.output import Column
from hpcsgd.commands.bench.studies.runner import run_plan, settings_of, with_option
from hpcsgd.commands.bench.studies.time_to_target import Metric, Runs, TargetTrial, TimeToTarget
from hpcsgd.commands.train.settings import Settings
from hpcsgd.strategies import STRATEGIES
from hpcsgd.strategies import delays as delay_specs


class StragglerTrial(TargetTrial[str]):
    """One run with a simulated delay and a target test accuracy."""

    @property
    def reached(self) -> tuple[float, float]:
        """Iterations and seconds to the first evaluation at the target; infinite if there is none."""
        above = np.flatnonzero(self.test.accuracy >= self.target)
        if not len(above):
            return np.inf, np.inf
        return float(self.test.step[above[0]]), float(self.test.time[above[0]])


class StragglerStudy(TimeToTarget[str, StragglerTrial]):
    """All runs of the study; `description` is their data set and ranks, for the tables."""

    name = "straggler"
    metric = Metric("accuracy", "test accuracy (%)", ".1f", scale=100)
    panels_in_row = 2
    notes = (
        "Delays are simulated: each rank sleeps for each gradient. cb-Full: backup:backups=0; cb-DyBW: "
        "backup; their iterations average the gradients that are ready, an iteration of adpsgd is one "
        "gradient per rank on average. Times exclude evaluation; medians over the seeds."
    )

    def __init__(self, trials: Sequence[StragglerTrial], description: str) -> None:
        super().__init__(trials)
        self._description = description
        self._full = next((m for m in self.methods if _waits_for_all(m)), None)

    def title(self, condition: str) -> str:
        target = self.trials[0].target
        return f"simulated delays {condition}; {self._description}; target {target:.1%}"

    def further_columns(self) -> list[Column[Runs[str, StragglerTrial]]]:
        return [
            Column(self._relative, heading="ms relative\nto cb-Full", form=".2f"),
            Column(lambda r: r.median(lambda t: t.accuracy), heading="final\naccuracy", form=".1%"),
        ]

    def _relative(self, runs: Runs[str, StragglerTrial]) -> float | None:
        return runs.seconds / self.runs(runs.condition, self._full).seconds if self._full else None

    def columns(self) -> list[Column[StragglerTrial]]:
        return [Column(lambda trial: trial.condition, "simulated_delays"), *super().columns()]


def _waits_for_all(method: str) -> bool:
    name, options = registry.parse(method)
    return name == "backup" and options.get("backups") == "0"


def default_delays(base_ms: float) -> list[str]:
    """One delay of each kind, with a mean gradient time of `base_ms`; four times as long on the slow rank."""
    base = base_ms / 1000
    return [
        f"constant:seconds={base:g}",
        f"slow:factor=4,seconds={base:g}",
        f"exponential:mean={base:g}",
        f"pareto:shape=1.5,scale={base / 3:.3g}",
    ]


def main(options: StragglerOptions) -> None:
    """Train with each method under each delay on the ranks of this job; rank 0 prints the tables.

    The methods alternate within a seed, so that a disturbance of the machine affects all of them. `out` gets
    the runs, `straggler.csv`, and `straggler.png`, accuracy against time.
    """
    given = [delay.replace("+", ",") for delay in options.delays or ()]
    delays, alpha = given or default_delays(options.base_ms), options.alpha
    grid = [(d, seed, method) for d in delays for seed in range(options.seeds) for method in options.methods]
    plan = [("-".join(map(str, point)), _settings(options, *point)) for point in grid]
    with open_world(path=options.out / f"{StragglerStudy.name}.csv") as world:
        finished = run_plan(world, options.out, plan)
        if world.rank == 0:
            trials = [
                StragglerTrial(*point, run, options.target) for point, run in zip(grid, finished, strict=True)
            ]
            skew = f", Dirichlet({alpha:g})" if alpha is not None else ""
            about = f"{options.data}{skew}, {output.describe_ranks(world)}, topology {options.topology}"
            StragglerStudy(trials, about).publish(options.out, output.environment(world))


def _settings(options: StragglerOptions, delay: str, seed: int, method: str) -> Settings:
    strategy = with_option(STRATEGIES, method, "topology", options.topology)
    delays = with_option(delay_specs.DELAYS, delay, "seed", seed)
    fixed = {"checkpoint_every": 0.0, "schedule": "constant"}
    return settings_of(options, strategy=strategy, delays=delays, seed=seed, **fixed)
