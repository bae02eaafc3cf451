"""One server of `hpcsgd serve`: its port, its clients, and when it ends."""

from __future__ import annotations

import json
import logging
import selectors
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpcsgd.commands.serve.dashboard import Board, row
from hpcsgd.commands.serve.persistence import Memory
from hpcsgd.commands.signals import Signals
from hpcsgd.commands.train.metrics import FILE
from hpcsgd.mpi.communicator import Transport
from hpcsgd.mpi.world import World
from hpcsgd.server import Policy, Server, tcp_link
from hpcsgd.server.metrics import figures_of
from hpcsgd.server.tcp_link import SocketLink
from hpcsgd.server.utilization import Load

_log = logging.getLogger("hpcsgd.server")
_TICK = 0.2  # seconds between two looks at what does not come over a link
_METRICS_EVERY = 5.0  # seconds


class Options(NamedTuple):
    """What a server is told when it is started.

    Attributes
    ----------
    listen
        The file that tells groups where the servers are.
    mode, alpha, max_staleness, lease
        See `hpcsgd.server.Policy`.
    checkpoint
        The folder that holds what the servers know; None: beside `listen`.
    checkpoint_every
        Seconds between two checkpoints.
    groups
        How many must have come before the servers may end.
    linger
        Seconds for which groups are waited for that left without a goodbye, once all others are done.
    progress
        What to show, see `hpcsgd.commands.serve.dashboard.Board`.
    """

    listen: Path
    mode: str = "sync"
    alpha: float | None = None
    max_staleness: int | None = None
    lease: float = 10.0
    checkpoint: Path | None = None
    checkpoint_every: float = 60.0
    groups: int = 1
    linger: float = 60.0
    progress: str = "auto"


class Service:
    """One server: its listening socket, the links of its clients, and what it keeps.

    Parameters
    ----------
    options, world
        See `serve`.
    folder
        What this server keeps.
    secret
        What clients must know.
    board
        Where it shows them.
    """

    def __init__(self, options: Options, world: World, folder: Path, secret: str, board: Board) -> None:
        from hpcsgd.kernels.sums import server_update

        self._options, self._world, self._board = options, world, board
        policy = Policy(options.mode, options.alpha, options.max_staleness, options.lease, secret)
        self._memory = Memory(folder, options.checkpoint_every)
        self.server = Server(policy, world.rank, world.size, self._memory.record)
        self._memory.recall(self.server)
        server_update.warm_up()
        self._metrics = (folder / FILE).open("a", buffering=1)
        self._listener = tcp_link.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._followed: dict[SocketLink, int] = {}
        self._signals = Signals(signal.SIGINT)
        self._votes = Votes(world.control)
        self._load = Load()
        self._came = self._waits = self._told_of_seeds = False
        self._tick_at = self._metrics_at = 0.0

    def run(self) -> None:
        """Serve to the end; collective."""
        with self._signals.noted(), ExitStack() as stack:
            stack.callback(self._metrics.close)
            stack.callback(self._selector.close)
            stack.callback(self._listener.close)
            self._tell()
            for client in self.server.clients.values():
                client.since = time.monotonic()  # only from now on can it be heard
            while not self._over():
                self._look()
            self._end()

    def _tell(self) -> None:
        """Write the file that groups wait for."""
        options, world = self._options, self._world
        mine = (tcp_link.addresses(), int(self._listener.getsockname()[1]))
        meeting = tcp_link.Meeting(self.server.policy.secret, world.gather(mine, "the servers' addresses"))

        def write() -> None:
            if world.rank == 0:
                options.listen.parent.mkdir(parents=True, exist_ok=True)
                meeting.write(options.listen)

        world.together(write)
        servers = f"{world.size} server{'s' if world.size > 1 else ''}"
        _log.info("%s, mode %s: hpcsgd train --connect %s", servers, options.mode, options.listen)

    def _look(self) -> None:
        """Wait for something on the links, and let them move what can be moved."""
        ready = [key.fileobj for key, _ in self._selector.select(_TICK)]
        started = time.perf_counter()
        found = self.server.pump([link for link in ready if isinstance(link, SocketLink)])
        self._follow()
        if self._listener in ready:
            self._accept()
            self._follow()
        self._load.looked(found, time.perf_counter() - started)
        self._came = self._came or self._have_come()

    def _have_come(self) -> bool:
        """Whether so many groups were here as there shall be, of which one is not done."""
        clients, first = self.server.clients.values(), min(self.server.shards, default=-1)
        # The rank of a group that talks first has the first shard.
        groups = sum(first in client.shards for client in clients)
        return groups >= self._options.groups and not all(client.done for client in clients)

    def _accept(self) -> None:
        try:
            while True:
                connection, (host, port) = self._listener.accept()
                name, traffic = f"{host}:{port}", self._world.traffic
                self.server.add(SocketLink(connection, self.server, name, traffic))
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("a connection could not be accepted: %s", error)

    def _follow(self) -> None:
        """Let the selector know which links there are, and which have something to send."""
        links = [link for link in self.server.links if isinstance(link, SocketLink)]
        for link in self._followed.keys() - set(links):
            self._selector.unregister(link)
            del self._followed[link]
        for link in links:
            events = selectors.EVENT_READ | (0 if link.idle else selectors.EVENT_WRITE)
            if link not in self._followed:
                self._selector.register(link, events)
            elif events != self._followed[link]:
                self._selector.modify(link, events)
            self._followed[link] = events

    def _over(self) -> bool:
        """Now and then look at clocks; whether the servers have agreed to end."""
        now = time.monotonic()
        if now < self._tick_at:
            return False
        self._tick_at = now + _TICK
        self.server.watch()
        self._follow()
        self._memory.look()
        if self._world.rank == 0:
            self._board.show(self.server.clients.values())
        if not self._told_of_seeds:
            self._compare_seeds()
        if now >= self._metrics_at:
            self._metrics_at = now + _METRICS_EVERY
            self._write_metrics()
        return self._votes.cast(self._signals.caught is not None, self._is_left_alone())

    def _is_left_alone(self) -> bool:
        """Whether nobody is here, or is waited for, any more."""
        left = [client for client in self.server.clients.values() if not client.done]
        if not self._came or not left:
            return self._came
        away = all(client.link is None or not client.waited_for for client in left)
        names = ", ".join(client.name for client in left)
        # Who comes back at once, because it was this server that was away, must be heard first.
        linger = max(self._options.linger, self._options.lease)
        if away and not self._waits:
            _log.warning("nobody is here: waits up to %g s for %s", linger, names)
        self._waits = away
        if not away or min(client.silent_for for client in left) <= linger:
            return False
        _log.warning("%s did not say goodbye, and did not come back for %g s", names, linger)
        return True

    def _compare_seeds(self) -> None:
        """Groups with one seed would go through their data in the same order."""
        names: dict[int, str] = {}
        for client in self.server.clients.values():
            if client.seed is not None and client.link is not None:
                other = names.setdefault(client.seed, client.name)
                if other != client.name:
                    text = "%s and %s have the same seed, %d, and draw the same batches: set another --seed"
                    _log.warning(text, other, client.name, client.seed)
                    self._told_of_seeds = True

    def _write_metrics(self) -> None:
        server = self.server
        record = {
            "event": "server",
            "time": round(time.time(), 3),
            "versions": {index: shard.version for index, shard in server.shards.items()},
            **figures_of(server.counting.staleness, server.counting.left_out, self._load.figures()),
            "clients": [row(client) for client in server.clients.values()],
        }
        self._metrics.write(json.dumps(record) + "\n")

    def _end(self) -> None:
        options, caught = self._options, self._signals.caught
        if self._world.rank == 0:
            options.listen.unlink(missing_ok=True)
            self._board.show(self.server.clients.values())
        self._write_metrics()
        self._memory.close()
        updates = sum(shard.version for shard in self.server.shards.values())
        if self._votes.stopped:
            name = signal.Signals(caught).name if caught is not None else "another server was stopped"
            _log.info("%s: state after %s updates is kept; groups wait for a server", name, f"{updates:,}")
        else:
            _log.info("done, after %s updates", f"{updates:,}")
        for link in self.server.links:
            link.close()


class Votes:
    """Asks all servers again and again whether they may end, without waiting for answers.

    Parameters
    ----------
    transport
        The servers' ranks.

    Attributes
    ----------
    stopped
        Whether any was told to stop.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._mine = np.empty(2, np.int32)
        self._all = np.empty((transport.size, 2), np.int32)
        self._round: Any = None
        self.stopped = False

    def cast(self, stopped: bool, alone: bool) -> bool:
        """Give this server's word; returns whether a round is over in which one stopped, or all are alone."""
        if self._round is None:
            self._mine[:] = stopped, alone
            self._round = self._transport.iallgather(self._mine, self._all)
        if not self._round.Test():
            return False
        self._round = None
        self.stopped = bool(self._all[:, 0].any())
        return self.stopped or bool(self._all[:, 1].all())
