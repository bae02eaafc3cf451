"""Listening sockets of a server, at addresses of its host."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence

from hpcsgd.errors import BadOption

_SIOCGIFADDR = 0x8915
_BACKLOG = 4096  # the kernel takes less where net.core.somaxconn is less
_ATTEMPTS = 20  # to find a port that is free at all addresses


def interface_addresses() -> dict[str, str]:
    """IPv4 address of each interface of this host, the loopback last."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(reply[20:24])
    return dict(sorted(found.items(), key=lambda item: item[1].startswith("127.")))


def resolve(bind: Sequence[str]) -> list[str]:
    """Addresses of this host that `bind` selects.

    Parameters
    ----------
    bind
        Addresses, networks ("10.1.0.0/16") or names of interfaces; empty: the addresses of all interfaces.

    Raises
    ------
    BadOption
        If one of them is none of this host's.
    """
    interfaces = interface_addresses()
    if not bind:
        return list(interfaces.values())
    found = [address for text in bind for address in _matching(text, interfaces)]
    return list(dict.fromkeys(found))


def _matching(text: str, interfaces: dict[str, str]) -> list[str]:
    if text in interfaces:
        return [interfaces[text]]
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise _none_of(text, interfaces) from None
    found = [each for each in interfaces.values() if ipaddress.ip_address(each) in network]
    if not found and network.num_addresses == 1:
        found = [str(network.network_address)]  # one that no interface has as its first, or of IPv6
    if not found:
        raise _none_of(text, interfaces)
    return found


def _none_of(text: str, interfaces: dict[str, str]) -> BadOption:
    known = ", ".join(f"{name} ({address})" for name, address in interfaces.items())
    return BadOption(
        f"--bind {text} is no address, network or interface of {socket.gethostname()}",
        expected=f"one of {known}, or a network as 10.0.0.0/8 that holds one of them",
        got=repr(text),
        do="name an address by which the groups reach this host",
    )


def listen(addresses: Sequence[str]) -> list[socket.socket]:
    """Non-blocking listening sockets, at each address, on one port that is free at all of them.

    Raises
    ------
    BadOption
        If this host does not have one of the addresses.
    """
    for attempt in range(_ATTEMPTS):
        listeners: list[socket.socket] = []
        port = 0
        try:
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listeners.append(socket.create_server((address, port), family=family, backlog=_BACKLOG))
                listeners[-1].setblocking(False)
                port = listeners[-1].getsockname()[1]
            return listeners
        except OSError as error:
            for listener in listeners:
                listener.close()
            if not port or attempt == _ATTEMPTS - 1:
                raise BadOption(
                    f"{socket.gethostname()} cannot listen at {address}",
                    got=error.strerror or str(error),
                    do="name an address of this host: hpcsgd serve --bind ADDRESS",
                ) from None
    raise AssertionError
