"""`hpcsgd bench straggler`: the cost of slow ranks to each method, with simulated delays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import run_plan, with_option
from hpcsgd.commands.bench.studies.straggler_results import StragglerStudy, StragglerTrial
from hpcsgd.commands.train.settings import Settings, validate
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES
from hpcsgd.strategies import delays as delay_specs

METHODS = ("allreduce", "backup:backups=0", "backup:backups=1", "backup", "dsgd", "adpsgd")


def default_delays(base_ms: float) -> list[str]:
    """One delay of each kind, with a mean gradient time of `base_ms`; four times as long on the slow rank."""
    base = base_ms / 1000
    return [
        f"constant:seconds={base:g}",
        f"slow:factor=4,seconds={base:g}",
        f"exponential:mean={base:g}",
        f"pareto:shape=1.5,scale={base / 3:.3g}",
    ]


def main(
    methods: Sequence[str] = METHODS,
    delays: Sequence[str] = (),
    topology: str = "ring",
    base_ms: float = 20.0,
    seeds: int = 3,
    target: float = 0.9,
    epochs: float = 5.0,
    evaluate_every: float = 1.0,
    optimizer: str = "adam",
    learning_rate: float = 0.005,
    data: str = "digits",
    alpha: float | None = None,
    out: str | Path = "straggler",
) -> None:
    """Train with each method under each delay on the ranks of this job; rank 0 prints the tables.

    The methods alternate within a seed, so that a disturbance of the machine affects all of them. `out` gets
    the runs, `straggler.csv`, and `straggler.png`, accuracy against time. A study that was interrupted
    continues with the same command.

    Parameters
    ----------
    methods
        Strategies, as for `hpcsgd train --strategy`.
    delays
        As for `hpcsgd train --delays`. Default: constant, one rank four times slower, exponential, Pareto.
    topology
        Topology of the methods that have one and do not name it. Default "ring".
    base_ms
        Simulated gradient time of the default delays in milliseconds. Default 20.
    seeds
        Runs per method and delay, at least 1. Default 3.
    target
        Target test accuracy, from 0 to 1. Default 0.9.
    epochs, evaluate_every, optimizer, learning_rate, data, alpha
        As for `hpcsgd train`; the learning rate is constant. All ranks synchronise before an evaluation, with
        asynchronous methods too, and the wait counts as training time: evaluate seldom.
    out
        The folder of the study. Default "straggler".

    Raises
    ------
    BadOption
        An option of the runs is out of its range.
    HpcsgdError
        On all ranks, if a run fails.
    """
    delays = [delay.replace("+", ",") for delay in delays] or default_delays(base_ms)
    common = validate(
        Settings(
            data=data,
            alpha=alpha,
            epochs=epochs,
            evaluate_every=evaluate_every,
            checkpoint_every=0.0,
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule="constant",
        )
    )
    grid = [(delay, seed, method) for delay in delays for seed in range(seeds) for method in methods]
    plan = [("-".join(map(str, point)), _settings(common, topology, *point)) for point in grid]
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / "straggler.csv")
        finished = run_plan(world, out, plan)
        if world.rank == 0:
            trials = [StragglerTrial(*point, run) for point, run in zip(grid, finished, strict=True)]
            skew = f", Dirichlet({alpha:g})" if alpha is not None else ""
            study = StragglerStudy(
                trials, target, f"{data}{skew}, {output.describe_ranks(world)}, topology {topology}"
            )
            study.publish(out, output.environment(world))


def _settings(common: Settings, topology: str, delay: str, seed: int, method: str) -> Settings:
    strategy = with_option(STRATEGIES, method, "topology", topology)
    seeded = with_option(delay_specs.DELAYS, delay, "seed", seed)
    return replace(common, strategy=strategy, delays=seeded, seed=seed)
