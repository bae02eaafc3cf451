"""`hpcsgd bench straggler`: what slow ranks cost each method, with delays that are simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import carry_out, check_each_once, with_option
from hpcsgd.commands.bench.studies.straggler_results import Study, Trial
from hpcsgd.commands.bench.timing import check_positive
from hpcsgd.commands.train.settings import Settings, validate
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES
from hpcsgd.strategies import delays as delay_specs

METHODS = ("allreduce", "backup:backups=0", "backup:backups=1", "backup", "dsgd", "adpsgd")


def default_delays(base_ms: float) -> list[str]:
    """One of each kind, in which a gradient takes `base_ms` on average; of the slow rank four times that."""
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

    Methods take turns within a seed, so that what disturbs the machine disturbs them all. In `out` are
    the runs, `straggler.csv`, and `straggler.png`, accuracy against time. A study that was stopped goes
    on with the same command.

    Parameters
    ----------
    methods
        Strategies, as of `hpcsgd train --strategy`.
    delays
        As of `hpcsgd train --delays`. Default: constant, one rank four times slower, exponential, Pareto.
    topology
        Of the methods that have one and do not name it. Default "ring".
    base_ms
        Of the default delays: what a gradient takes, in milliseconds. Default 20.
    seeds
        Runs of each, at least 1. Default 3.
    target
        Test accuracy, from 0 to 1. Default 0.9.
    epochs, evaluate_every, optimizer, learning_rate, data, alpha
        As of `hpcsgd train`; the learning rate is constant. All ranks meet before an evaluation, also those
        of methods that else wait for nobody, which counts as time: evaluate seldom.
    out
        A folder. Default "straggler".

    Raises
    ------
    BadOption
        An option out of its range, or a method or a delay that does not exist.
    HpcsgdError
        On all ranks, where a run fails.
    """
    check_positive("seeds, base_ms and target", [seeds, base_ms, target])
    delays = [delay.replace("+", ",") for delay in delays] or default_delays(base_ms)
    _check(methods, delays)
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
    asked = [(delay, seed, method) for delay in delays for seed in range(seeds) for method in methods]
    plan = [("-".join(map(str, one)), _settings(common, topology, *one)) for one in asked]
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / "straggler.csv")
        done = carry_out(world, out, plan)
        if world.rank == 0:
            trials = [Trial(*one, finished) for one, finished in zip(asked, done, strict=True)]
            skew = f", Dirichlet({alpha:g})" if alpha is not None else ""
            study = Study(trials, target, f"{data}{skew}, {output.layout(world)}, topology {topology}")
            study.publish(out, output.facts(world))


def _check(methods: Sequence[str], delays: Sequence[str]) -> None:
    check_each_once("methods and delays", methods, delays)
    for delay in delays:
        delay_specs.build(delay)
    for method in methods:
        registry.build(STRATEGIES, method, "strategy")


def _settings(common: Settings, topology: str, delay: str, seed: int, method: str) -> Settings:
    strategy = with_option(STRATEGIES, method, "topology", topology)
    seeded = with_option(delay_specs.DELAYS, delay, "seed", seed)
    return replace(common, strategy=strategy, delays=seeded, seed=seed)
