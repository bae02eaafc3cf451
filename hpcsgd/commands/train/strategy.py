"""The strategy and the simulated delays of a run, and the checks of settings that depend on each other."""

from __future__ import annotations

from hpcsgd import registry
from hpcsgd.collectives.peers import Peers
from hpcsgd.commands.train.settings import Settings
from hpcsgd.errors import BadOption
from hpcsgd.strategies import build, delays
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.delays import Delays


def build_strategy(settings: Settings) -> Strategy:
    """Build the strategy of a run.

    Raises
    ------
    BadOption
        Unknown strategy or option, or `--connect` with a strategy without parameter servers.
    """
    if not settings.connect:
        return build(settings.strategy)
    if registry.parse(settings.strategy)[0] != "ps":
        raise BadOption(
            "--connect needs a strategy with parameter servers",
            got=f"--strategy {settings.strategy} --connect {settings.connect}",
            do="use --strategy ps:mode=..., with the mode of the servers, or leave out --connect",
            everywhere=True,
        )
    return build(settings.strategy, connect=settings.connect)


def build_delays(settings: Settings, peers: Peers, *, clamp: bool) -> Delays:
    """Build the simulated delays of a run.

    With `clamp` they may name peers that do not exist any more, since ranks have failed.

    Raises
    ------
    BadOption
        On all ranks: peers that do not exist, or delays with virtual nodes.
    """
    found = delays.build(settings.delays)
    if clamp:
        found.clamp_to(peers.size)
    found.check_peers(peers.size)
    if settings.delays != "none" and peers.per_rank > 1:
        raise BadOption(
            "virtual nodes cannot have delays in real time: those of one rank compute one after the other",
            got=f"--delays {settings.delays}",
            do=f"use virtual time: --strategy backup:delays={settings.delays.replace(',', '+')}",
            everywhere=True,
        )
    return found
