"""The strategy of a run, and the checks of settings that depend on each other."""

from __future__ import annotations

from hpcsgd import registry
from hpcsgd.collectives.peers import Peers
from hpcsgd.commands.train.settings import Settings
from hpcsgd.errors import BadOption
from hpcsgd.strategies import STRATEGIES, Strategy


def build_strategy(settings: Settings) -> Strategy:
    """Build the strategy of a run.

    Raises
    ------
    BadOption
        Unknown strategy or option, or `--connect` with a strategy without parameter servers.
    """
    if not settings.connect:
        return registry.build(STRATEGIES, settings.strategy, "strategy")
    if registry.parse(settings.strategy)[0] != "ps":
        raise BadOption(
            "--connect needs a strategy with parameter servers",
            got=f"--strategy {settings.strategy} --connect {settings.connect}",
            do="use --strategy ps:mode=..., with the mode of the servers, or leave out --connect",
            everywhere=True,
        )
    return registry.build(STRATEGIES, settings.strategy, "strategy", connect=settings.connect)


def check_delays(settings: Settings, peers: Peers) -> None:
    """Raise on all ranks if simulated delays are combined with virtual nodes."""
    if settings.delays != "none" and peers.per_rank > 1:
        raise BadOption(
            "virtual nodes cannot have delays in real time: those of one rank compute one after the other",
            got=f"--delays {settings.delays}",
            do=f"use virtual time: --strategy backup:delays={settings.delays.replace(',', '+')}",
            everywhere=True,
        )
