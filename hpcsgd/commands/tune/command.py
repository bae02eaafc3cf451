"""`hpcsgd tune` on the command line."""

from __future__ import annotations

import click

from hpcsgd.commands.options import option
from hpcsgd.commands.train.click_options import click_options
from hpcsgd.commands.train.settings import Epochs, Settings


@click.group()
def tune() -> None:
    """Search for the best value of an option."""


@tune.command()
@click_options
@option("--search-epochs", Epochs, "Length of the search, in epochs; default: --epochs.")
@click.option("--go-on", "train_best", is_flag=True, help="Train with the best number afterwards.")
def teleportation(settings: Settings, search_epochs: float | None, train_best: bool) -> None:
    """Search for the best number of active peers of `teleport`.

    Trains with 1, 2, 4, ... active peers at once, on disjoint groups of all peers, in the time of one
    training. To choose the numbers and other options:
    --strategy teleport:active=1x3x9,topology=ring.
    """
    from hpcsgd.commands.tune.teleportation import search

    search(settings, search_epochs, train_best)
