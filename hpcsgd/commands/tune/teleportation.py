"""`hpcsgd tune teleportation`: finds the best number of active peers by one training with several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from hpcsgd import registry
from hpcsgd.collectives.peers import Peers
from hpcsgd.commands.train.settings import Settings
from hpcsgd.commands.train.trainer import Trainer, train
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.strategies.teleportation.strategy import Teleportation
from hpcsgd.training.data.partition import evaluation_shard

_STRATEGY = "teleport"
_TRAINING_SAMPLES = 4096  # at most, for the comparison of the numbers


@dataclass(frozen=True)
class Point:
    """One evaluation with one number of active peers; `loss` is the loss on training samples."""

    active: int
    step: int
    loss: float
    test_loss: float
    test_accuracy: float


def search(settings: Settings, search_epochs: float | None = None, train_best: bool = False) -> int:
    """Train with 1, 2, 4, ... active peers at once, on disjoint groups of peers; collective.

    Each group moves over all peers, so each number gets a complete training in the iterations of one. The
    best number is the one whose consensus model has the smallest loss on training samples.

    Parameters
    ----------
    settings
        Settings of the training. The strategy may be "teleport" with options; `active=1x2x4`: the numbers.
    search_epochs
        Length of the search, in epochs; default: that of the training.
    train_best
        Train with the best number afterwards. Default False.

    Returns
    -------
    int
        The best number.

    Raises
    ------
    BadOption
        Another strategy, or more active peers than there are peers.
    """
    options = _options(settings)
    length = settings.epochs if search_epochs is None else search_epochs
    with World(device=settings.device, timeout=settings.timeout) as world:
        size = Peers(world, settings.virtual_nodes).size
        numbers = options.pop("active", None) or "x".join(map(str, powers_of_two(size)))
        named = replace(settings, strategy=_spec(options, numbers), epochs=length)
        trainer = world.collectively(lambda: SearchTrainer(named, world))
        folder = trainer.execute()
        best = best_number(trainer.curve)
        if world.rank == 0:
            _print_table(trainer.curve, best, folder)
    if train_best:
        train(replace(settings, strategy=_spec(options, str(best)), name=_run_name(settings.name, best)))
    return best


def powers_of_two(size: int) -> list[int]:
    """Return 1, 2, 4, ... as long as their sum is at most `size`."""
    found = [1]
    while sum(found) + 2 * found[-1] <= size:
        found.append(2 * found[-1])
    return found


def best_number(curve: Sequence[Point]) -> int:
    """Return the number with the smallest last loss; of equal ones the smaller, which sends less."""
    last = max(point.step for point in curve)
    ending = [point for point in curve if point.step == last]
    return min(ending, key=lambda point: (point.loss != point.loss, point.loss, point.active)).active


class SearchTrainer(Trainer):
    """A run whose tokens form groups of different sizes, each of which is evaluated separately."""

    def __init__(self, settings: Settings, world: World) -> None:
        super().__init__(settings, world)
        self.curve: list[Point] = []
        count = min(len(self.data.train), _TRAINING_SAMPLES)
        spread = torch.linspace(0, len(self.data.train) - 1, count, device="cpu").long()
        self._samples = spread[evaluation_shard(count, world.rank, world.size)]

    @torch.no_grad()
    def evaluate(self) -> None:
        strategy = cast(Teleportation, self.strategy)
        counters = self.world.gather(self.meter.read())
        for number, active in enumerate(strategy.tokens.sizes):
            strategy.evaluated_group = number
            train_loss = self.measure(self.data.train, self._samples).mean_loss
            test = self.measure(self.data.test, self.shard)
            point = Point(active, self.step, train_loss, test.mean_loss, test.accuracy)
            self.curve.append(point)
            self.log.write("tune", self.step, counters, point.__dict__)


def _options(settings: Settings) -> dict[str, str]:
    name, options = registry.parse(settings.strategy)
    if name not in (_STRATEGY, Settings().strategy):
        raise BadOption(
            f"strategy {name!r} has no number of active peers to search for",
            do=f"leave --strategy out, or use {_STRATEGY} with options",
            everywhere=True,
        )
    if settings.resume:
        raise BadOption("a search cannot be resumed", do="start it again, without --resume", everywhere=True)
    return options


def _spec(options: dict[str, str], active: str) -> str:
    pairs = {"active": active, **options}
    return f"{_STRATEGY}:" + ",".join(f"{key}={value}" for key, value in pairs.items())


def _run_name(name: str, active: int) -> str:
    return f"{name}-active-{active}" if name else ""


def _print_table(curve: Sequence[Point], best: int, folder: Path) -> None:
    numbers = sorted({point.active for point in curve})
    table = Table(title="active peers: loss on training samples (test accuracy)", title_justify="left")
    table.add_column("step", justify="right")
    for active in numbers:
        table.add_column(f"{active}{' *' if active == best else ''}", justify="right")
    for step in sorted({point.step for point in curve}):
        row = {point.active: point for point in curve if point.step == step}
        cells = [f"{row[n].loss:.4f} ({row[n].test_accuracy:.1%})" for n in numbers]
        table.add_row(str(step), *cells)
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
    print(f"best: --strategy {_STRATEGY}:active={best}; {folder}", flush=True)
