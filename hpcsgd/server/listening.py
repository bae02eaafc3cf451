"""Listening sockets of a server, at addresses of its host."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hpcsgd.errors import BadOption

_SIOCGIFCONF = 0x8912  # all IPv4 addresses, the secondary ones too
_IFREQ_BYTES, _MOST_ADDRESSES = 40, 4096
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_LINK_SCOPE, _TENTATIVE_OR_FAILED = 0x20, 0x48
_BACKLOG = 4096  # the kernel takes less where net.core.somaxconn is less
_ATTEMPTS = 200  # to find a port that is free at all addresses


class InterfaceAddress(NamedTuple):
    """An address of this host, and the name of its interface."""

    interface: str
    address: str


def interface_addresses() -> list[InterfaceAddress]:
    """All addresses of this host but those of a link only: IPv4 before IPv6, those of the loopback last."""
    found = [*_ipv4_addresses(), *_ipv6_addresses()]
    return sorted(found, key=lambda each: ipaddress.ip_address(each.address).is_loopback)


def _ipv4_addresses() -> list[InterfaceAddress]:
    buffer = array("B", bytes(_IFREQ_BYTES * _MOST_ADDRESSES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
        size, _ = struct.unpack("iL", fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, request))
    rows = (buffer[start : start + _IFREQ_BYTES].tobytes() for start in range(0, size, _IFREQ_BYTES))
    # A label of a secondary address is "eth0:1".
    return [
        InterfaceAddress(row[:16].rstrip(b"\0").decode().partition(":")[0], socket.inet_ntoa(row[20:24]))
        for row in rows
    ]


def _ipv6_addresses() -> list[InterfaceAddress]:
    try:
        lines = _IPV6_ADDRESSES.read_text().splitlines()
    except OSError:  # a kernel without IPv6
        return []
    found = []
    for digits, _, _, scope, flags, name in map(str.split, lines):
        if int(scope, 16) != _LINK_SCOPE and not int(flags, 16) & _TENTATIVE_OR_FAILED:
            found.append(InterfaceAddress(name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found


def resolve(bind: Sequence[str]) -> list[str]:
    """Addresses of this host that `bind` selects.

    Parameters
    ----------
    bind
        Addresses, networks ("10.1.0.0/16") or names of interfaces; "0.0.0.0" are all of IPv4; empty, or
        "::": all addresses.

    Raises
    ------
    BadOption
        If one of them is none of this host's, or the host has none at all.
    """
    known = interface_addresses()
    found = [address for text in bind for address in _matching(text, known)]
    if not bind:
        found = [each.address for each in known]
    if not found:
        raise BadOption(
            f"{socket.gethostname()} has no network address",
            expected="at least one interface that is up, the loopback for instance",
            got="none",
            do="bring one up: ip link set lo up",
        )
    return list(dict.fromkeys(found))


def _matching(text: str, known: Sequence[InterfaceAddress]) -> list[str]:
    found = [each.address for each in known if each.interface == text]
    if found:
        return found
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise _none_of(text, known) from None
    if network.num_addresses == 1 and network.network_address.is_unspecified:
        return [each.address for each in known if network.version == 6 or ":" not in each.address]
    found = [each.address for each in known if ipaddress.ip_address(each.address) in network]
    if not found and network.num_addresses == 1 and network.is_loopback:
        found = [str(network.network_address)]  # the loopback has the whole of 127.0.0.0/8
    if not found:
        raise _none_of(text, known)
    return found


def _none_of(text: str, known: Sequence[InterfaceAddress]) -> BadOption:
    listed = ", ".join(f"{each.interface} ({each.address})" for each in known)
    return BadOption(
        f"--bind {text} is no address, network or interface of {socket.gethostname()}",
        expected=f"one of {listed}, or a network as 10.0.0.0/8 that holds one of them",
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
