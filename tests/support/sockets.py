"""Pairs of connected TCP sockets of this host, and greetings between them."""

from __future__ import annotations

import selectors
import socket

from hpcsgd.server.listening import listen
from hpcsgd.server.proof import Greeting
from hpcsgd.server.protocol import Disconnected


def sockets() -> tuple[socket.socket, socket.socket]:
    """Both ends of a blocking connection; the second is the listener's."""
    (listener,) = listen(["127.0.0.1"])
    one = socket.create_connection(listener.getsockname())
    listener.setblocking(True)
    other, _ = listener.accept()
    listener.close()
    return one, other


def greet(*greetings: Greeting) -> list[socket.socket | str]:
    """Run greetings to their ends; returns the connection, or the reason of the failure, of each."""
    ends: dict[int, socket.socket | str] = {}
    while len(ends) < len(greetings):
        for number, greeting in enumerate(greetings):
            if number in ends:
                continue
            try:
                assert next(greeting) in (selectors.EVENT_READ, selectors.EVENT_WRITE)
            except StopIteration as done:
                ends[number] = done.value
            except Disconnected as error:
                ends[number] = str(error)
    return [ends[number] for number in range(len(greetings))]
