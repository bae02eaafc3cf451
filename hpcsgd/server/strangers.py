"""Connections whose client has not proved the job's secret yet: bounded in time, number and work.

A stranger costs a descriptor, and less than 200 of its bytes are kept. It is closed when its time is over,
which single bytes do not extend, and when there are too many: then the oldest of the address with most of
them goes, so that a flood from one host drives out itself. What a host opens beyond its rate is closed at
once, which costs so little that the kernel's queue stays short, and others come in.
"""

from __future__ import annotations

import logging
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence

from hpcsgd.server.proof import Greeting, ServerIdentity, greet_client
from hpcsgd.server.protocol import Disconnected, ProtocolError

_log = logging.getLogger("hpcsgd.server")
_SECONDS = 10.0  # from the connection to the proof
_MOST, _DESCRIPTOR_SHARE = 256, 4  # strangers at a time, and at most a quarter of all descriptors
_BURST, _RATE = 256, 50  # greetings of one host at once, and in a second; more are closed unread
_ACCEPTED_AT_ONCE = 16
_QUANTUM = 0.001  # seconds of work, then the known clients' turn has come
_SHARE = 20  # while clients send, one part in so many of the time is for strangers
_PAUSE_WITHOUT_DESCRIPTORS = 1.0  # seconds
_LOGGED_AT_ONCE, _LOG_INTERVAL = 5, 60.0  # refusals, then their number once a minute


class Strangers:
    """Accepts connections and hands over those that have proved the secret.

    Parameters
    ----------
    listeners
        Listening sockets, which this object owns and closes.
    identity
        See `ServerIdentity`.
    on_proof
        Called with a connection whose client has proved the secret, and its name "host:port".

    Attributes
    ----------
    due_at
        Time, of `time.monotonic`, before which `serve` does nothing.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        identity: ServerIdentity,
        on_proof: Callable[[socket.socket, str], None],
    ) -> None:
        self._listeners, self._identity, self._on_proof = listeners, identity, on_proof
        self._selector = selectors.EpollSelector()
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._greeted: dict[int, _Stranger] = {}  # by descriptor, the oldest first
        self._number_by_host: Counter[str] = Counter()
        self._most = min(_MOST, raise_descriptor_limit() // _DESCRIPTOR_SHARE)
        self._refusals, self._rates = _RefusalLog(), _HostRates()
        self._proved: list[tuple[socket.socket, str]] = []
        self.due_at = 0.0

    def fileno(self) -> int:
        """For `selectors`: readable while `serve` has something to do."""
        return self._selector.fileno()

    def __len__(self) -> int:
        return len(self._greeted)

    def serve(self, busy: bool = False) -> None:
        """Accept and greet what is ready, for a millisecond at most.

        Parameters
        ----------
        busy
            Whether clients are sending: then these have 19 times as long before the next turn. Default False.
        """
        started = time.monotonic()
        if started < self.due_at:
            return
        # In time of the processor: the time in which another process has it is not the strangers' fault.
        begun = time.thread_time()
        self._greet_until(begun + _QUANTUM)
        if busy:
            self.due_at = max(self.due_at, started + _SHARE * (time.thread_time() - begun))
        while self._proved:  # what clients cost is no stranger's
            self._on_proof(*self._proved.pop(0))

    def _greet_until(self, deadline: float) -> None:
        for key, _ in self._selector.select(0):
            stranger = self._greeted.get(key.fd)
            if key.data is None:
                self._accept(key.fileobj)  # type: ignore[arg-type]
            elif stranger is not None and stranger is key.data:  # not refused for another's sake just now
                self._advance(stranger)
            if time.thread_time() > deadline:
                return

    def expire(self) -> None:
        """Close the strangers whose time is over; called periodically."""
        now = time.monotonic()
        for stranger in list(self._greeted.values()):
            if now < stranger.deadline:
                break
            self._refuse(stranger, f"the client has not proved the secret for {_SECONDS:g} s")
        self._refusals.summarize()
        self._rates.forget_idle(now)

    def close(self) -> None:
        for stranger in list(self._greeted.values()):
            self._forget(stranger)
            stranger.greeting.close()
        self._selector.close()
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, (host, port, *_rest) = listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # it is gone already
            except OSError as error:
                self._refusals.add("a connection", str(error))
                self.due_at = time.monotonic() + _PAUSE_WITHOUT_DESCRIPTORS
                return
            if not self._rates.take(host, time.monotonic()):
                connection.close()
                self._refusals.add(
                    f"{host}:{port}", f"this host opens more than {_RATE} connections a second"
                )
                continue
            connection.setblocking(False)
            self._make_room()
            stranger = _Stranger(connection.fileno(), host, port, greet_client(connection, self._identity))
            self._greeted[stranger.descriptor] = stranger
            self._number_by_host[host] += 1
            self._selector.register(stranger.descriptor, selectors.EVENT_READ, stranger)
            self._advance(stranger)

    def _make_room(self) -> None:
        if len(self._greeted) >= self._most:
            crowd = max(self._number_by_host, key=self._number_by_host.__getitem__)
            oldest = next(s for s in self._greeted.values() if s.host == crowd)
            self._refuse(oldest, f"{self._most} connections have not proved the secret")

    def _advance(self, stranger: _Stranger) -> None:
        try:
            event = next(stranger.greeting)
        except StopIteration as proved:
            self._forget(stranger)
            self._proved.append((proved.value, stranger.name))
        except ProtocolError as error:
            self._refuse(stranger, str(error))
        except Disconnected:  # by itself: a probe of the port, or a client that was faster at another address
            self._forget(stranger)
        else:
            if event != stranger.event:
                stranger.event = event
                self._selector.modify(stranger.descriptor, event, stranger)

    def _refuse(self, stranger: _Stranger, reason: str) -> None:
        self._forget(stranger)
        stranger.greeting.close()
        self._refusals.add(stranger.name, reason)

    def _forget(self, stranger: _Stranger) -> None:
        self._selector.unregister(stranger.descriptor)
        del self._greeted[stranger.descriptor]
        self._number_by_host[stranger.host] -= 1
        if not self._number_by_host[stranger.host]:
            del self._number_by_host[stranger.host]


class _Stranger:
    """One connection, and how far its greeting has come."""

    def __init__(self, descriptor: int, host: str, port: int, greeting: Greeting) -> None:
        self.descriptor, self.host, self.greeting = descriptor, host, greeting
        self.name = f"{host}:{port}"
        self.event = selectors.EVENT_READ
        self.deadline = time.monotonic() + _SECONDS


class _HostRates:
    """Greetings that each host may still have: a bucket of tokens that fills with time."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[float, float]] = {}  # by host: their number at a time

    def take(self, host: str, now: float) -> bool:
        """Take a token of a host; returns whether it had one."""
        tokens = self._at(host, now)
        self._tokens[host] = tokens - (tokens >= 1), now
        return tokens >= 1

    def forget_idle(self, now: float) -> None:
        """Forget hosts that have all their tokens again."""
        for host in [host for host in self._tokens if self._at(host, now) >= _BURST]:
            del self._tokens[host]

    def _at(self, host: str, now: float) -> float:
        tokens, since = self._tokens.get(host, (float(_BURST), now))
        return min(tokens + (now - since) * _RATE, float(_BURST))


class _RefusalLog:
    """Logs some refusals of each minute, and the number of the others."""

    def __init__(self) -> None:
        self._since, self._number = time.monotonic(), 0
        self._last = ""

    def add(self, name: str, reason: str) -> None:
        self._number, self._last = self._number + 1, f"{name}: {reason}"
        if self._number <= _LOGGED_AT_ONCE:
            _log.warning("%s was not admitted: %s", name, reason)

    def summarize(self) -> None:
        """Log the number of refusals that were not logged, once a minute; called periodically."""
        if time.monotonic() - self._since < _LOG_INTERVAL:
            return
        if self._number > _LOGGED_AT_ONCE:
            more = f"{self._number - _LOGGED_AT_ONCE:,}"
            _log.warning("%s more connections were not admitted; the last: %s", more, self._last)
        self._since, self._number = time.monotonic(), 0


def raise_descriptor_limit() -> int:
    """Raise this process' limit of open descriptors to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 2**20
