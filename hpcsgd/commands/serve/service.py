"""One server of `hpcsgd serve`: event loop, metrics and shutdown."""

from __future__ import annotations

import json
import logging
import math
import selectors
import signal
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from hpcsgd.commands.serve.dashboard import ServerDashboard, session_row
from hpcsgd.commands.serve.options import ServeOptions
from hpcsgd.commands.serve.persistence import ServerPersistence
from hpcsgd.commands.signals import SignalRecorder
from hpcsgd.commands.train.metrics import FILE
from hpcsgd.errors import HpcsgdError, os_errors
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.world import World
from hpcsgd.server import Policy, Server, listening
from hpcsgd.server.certificate import make_server_context
from hpcsgd.server.metrics import Utilization, server_metrics
from hpcsgd.server.proof import ServerIdentity
from hpcsgd.server.rendezvous import Endpoint, RendezvousFile
from hpcsgd.server.strangers import Strangers
from hpcsgd.server.tcp_link import TCPLink

_log = logging.getLogger("hpcsgd.server")
_TICK_SECONDS = 0.2  # between two checks of leases, checkpoints and signals
_METRICS_INTERVAL = 5.0  # seconds
_BUSY_SECONDS = 1.0  # since the last message of a client


class Service:
    """One server: its listening sockets, the links of its clients, and its persistent state.

    Clients authenticate by the secret; each rank of `world` is a server.
    """

    def __init__(
        self,
        options: ServeOptions,
        world: World,
        persistence: ServerPersistence,
        secret: str,
        dashboard: ServerDashboard,
    ) -> None:
        from hpcsgd.kernels.sums import server_update

        self._options, self._world, self._dashboard = options, world, dashboard
        policy = Policy(options.mode, options.alpha, options.max_staleness, options.lease)
        self._persistence = persistence
        self.server = Server(policy, world.rank, world.size, self._persistence.record_update)
        self._persistence.restore(self.server)
        server_update.warm_up()
        self._metrics = (persistence.folder / FILE).open("a", buffering=1)
        self._open_port(secret)
        self._selector = selectors.DefaultSelector()
        self._registered: dict[TCPLink | Strangers, int] = {}
        self._signals = SignalRecorder(signal.SIGINT)
        self._vote = EndVote(world.control)
        self._utilization = Utilization()
        self._expected_groups_connected = self._lingering = self._seeds_reported = False
        self._metrics_failed = False
        self._tick_at = self._metrics_at = 0.0
        self._moved_at = -math.inf

    def _open_port(self, secret: str) -> None:
        options = self._options
        addresses = listening.resolve(options.bind)
        listeners = listening.listen(addresses)
        context, fingerprint = (None, "") if options.tls is False else make_server_context()
        self._endpoint = Endpoint(addresses, int(listeners[0].getsockname()[1]), fingerprint)
        self._identity = ServerIdentity(secret, context, options.tls is True)
        self._strangers = Strangers(listeners, self._identity, self._add_link)

    def _add_link(self, connection: socket.socket, name: str) -> None:
        """Add a link to a client that has proved the secret."""
        link = TCPLink(connection, self.server, name, self._world.traffic)
        self.server.add_link(link)
        self.server.pump([link])  # its hello may be in the buffer of TLS, of which a selector knows nothing

    def run(self) -> None:
        """Serve until the servers agree to end; collective."""
        with self._signals.installed(), ExitStack() as stack:
            stack.callback(self._close_metrics)
            stack.callback(self._selector.close)
            stack.callback(self._strangers.close)
            self._publish_addresses()
            for session in self.server.sessions.values():
                session.last_seen = time.monotonic()  # its lease begins when it can connect
            while not self._should_end():
                self._poll()
            self._shut_down()

    def _publish_addresses(self) -> None:
        """Write the rendezvous file; collective."""
        options, world = self._options, self._world
        endpoints = world.gather(self._endpoint, "the servers' addresses")
        file = RendezvousFile(self._identity.secret, endpoints)

        def write() -> None:
            do = "give --listen a file that can be written, in a folder that all jobs can access"
            with os_errors(f"cannot write {options.listen}", do=do):
                if world.rank == 0:
                    options.listen.parent.mkdir(parents=True, exist_ok=True)
                    file.write(options.listen)

        world.collectively(write)
        servers = f"{world.size} server{'s' if world.size > 1 else ''}"
        _log.info("%s, mode %s: hpcsgd train --connect %s", servers, options.mode, options.listen)
        if options.tls is False:
            _log.info("links are not encrypted (--no-tls)")

    def _poll(self) -> None:
        """Wait for events on the sockets, and pump their links."""
        self._update_selector()
        pause = self._strangers.due_at - time.monotonic()
        timeout = min(pause, _TICK_SECONDS) if pause > 0 else _TICK_SECONDS
        ready = [key.fileobj for key, _ in self._selector.select(timeout)]
        started = time.perf_counter()
        moved = self.server.pump([link for link in ready if isinstance(link, TCPLink)])
        self._utilization.record_poll(moved, time.perf_counter() - started)
        if moved:
            self._moved_at = started
        if self._strangers in ready:
            # Also between the messages of clients: the next one would wait for a stranger's handshake.
            self._strangers.serve(busy=started - self._moved_at < _BUSY_SECONDS)
        self._expected_groups_connected = self._expected_groups_connected or self._groups_connected()

    def _groups_connected(self) -> bool:
        """Whether the expected number of groups has connected, and at least one is not done."""
        sessions, first = self.server.sessions.values(), min(self.server.shards, default=-1)
        # One gateway of each group has the first shard.
        groups = sum(first in session.shards for session in sessions)
        return groups >= self._options.groups and not all(session.done for session in sessions)

    def _update_selector(self) -> None:
        """Register all links, for writing too if they have messages to send, and the strangers if due."""
        events: dict[TCPLink | Strangers, int] = {
            link: selectors.EVENT_READ | (0 if link.idle else selectors.EVENT_WRITE)
            for link in self.server.links
            if isinstance(link, TCPLink)
        }
        if time.monotonic() >= self._strangers.due_at:
            events[self._strangers] = selectors.EVENT_READ
        for link in self._registered.keys() - events.keys():
            self._selector.unregister(link)
        for link, mask in events.items():
            if link not in self._registered:
                self._selector.register(link, mask)
            elif mask != self._registered[link]:
                self._selector.modify(link, mask)
        self._registered = events

    def _should_end(self) -> bool:
        """Do the periodic work; returns whether the servers have agreed to end."""
        now = time.monotonic()
        if now < self._tick_at:
            return False
        self._tick_at = now + _TICK_SECONDS
        self.server.check_leases()
        self._strangers.expire()
        self._persistence.maintain()
        if self._world.rank == 0:
            self._dashboard.show(self.server.sessions.values())
        if not self._seeds_reported:
            self._compare_seeds()
        if now >= self._metrics_at:
            self._metrics_at = now + _METRICS_INTERVAL
            self._write_metrics()
        return self._vote.poll(self._signals.received is not None, self._is_abandoned())

    def _is_abandoned(self) -> bool:
        """Whether all groups are done, or those that are not have been away for too long."""
        unfinished = [session for session in self.server.sessions.values() if not session.done]
        if not self._expected_groups_connected or not unfinished:
            return self._expected_groups_connected
        all_away = all(session.link is None or not session.alive for session in unfinished)
        names = ", ".join(session.name for session in unfinished)
        # Groups that reconnect to a restarted server at once must have the time to do so.
        linger = max(self._options.linger, self._options.lease)
        if all_away and not self._lingering:
            _log.warning(
                "no group is connected: the servers wait up to %g s (--linger) for %s", linger, names
            )
        self._lingering = all_away
        if not all_away or min(session.silent_for for session in unfinished) <= linger:
            return False
        _log.warning("%s did not close the session, and has not reconnected for %g s", names, linger)
        return True

    def _compare_seeds(self) -> None:
        """Warn of groups with equal seeds: they would use the same batches in the same order."""
        names: dict[int, str] = {}
        for session in self.server.sessions.values():
            if session.seed is not None and session.link is not None:
                other = names.setdefault(session.seed, session.name)
                if other != session.name:
                    text = "%s and %s have the same seed, %d, and use the same batches: change one --seed"
                    _log.warning(text, other, session.name, session.seed)
                    self._seeds_reported = True

    def _write_metrics(self) -> None:
        server, aggregator = self.server, self.server.aggregator
        record = {
            "event": "server",
            "time": round(time.time(), 3),
            "versions": {index: shard.version for index, shard in server.shards.items()},
            **server_metrics(aggregator.staleness, aggregator.dropped, self._utilization.metrics()),
            "clients": [session_row(session) for session in server.sessions.values()],
        }
        try:
            self._metrics.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self._metrics_failed:
                _log.warning("the servers' metrics cannot be written: %s", error)
            self._metrics_failed = True

    def _close_metrics(self) -> None:
        with suppress(OSError):
            self._metrics.close()

    def _remove_file(self) -> None:
        """Remove the rendezvous file, unless it is that of other servers by now."""
        with suppress(OSError, HpcsgdError):
            if RendezvousFile.read(self._options.listen).secret == self._identity.secret:
                self._options.listen.unlink()

    def _shut_down(self) -> None:
        caught = self._signals.received
        self._strangers.close()  # their descriptors may be the last ones, and the state needs some
        if self._world.rank == 0:
            self._remove_file()
            self._dashboard.show(self.server.sessions.values())
        self._write_metrics()
        self._persistence.close()
        updates = sum(shard.version for shard in self.server.shards.values())
        if self._vote.stopped:
            name = signal.Signals(caught).name if caught is not None else "another server was stopped"
            _log.info(
                "%s: state after %s updates is saved; groups wait until the servers are started again",
                name,
                f"{updates:,}",
            )
        else:
            _log.info("done, after %s updates", f"{updates:,}")
        for link in self.server.links:
            link.close()


class EndVote:
    """Repeated non-blocking vote of all servers on whether to end."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._flags = np.empty(2, np.int32)
        self._all = np.empty((communicator.size, 2), np.int32)
        self._request: Any = None
        self.stopped = False  # whether any server has received a signal to stop

    def poll(self, stopped: bool, abandoned: bool) -> bool:
        """Vote; returns whether a vote is complete in which one server was stopped, or all are abandoned."""
        if self._request is None:
            self._flags[:] = stopped, abandoned
            self._request = self._communicator.iallgather(self._flags, self._all)
        if not self._request.Test():
            return False
        self._request = None
        self.stopped = bool(self._all[:, 0].any())
        return self.stopped or bool(self._all[:, 1].all())
