"""Where servers listen: addresses, networks and interfaces of their host, on one port."""

from __future__ import annotations

import socket

import pytest

from hpcsgd.errors import BadOption
from hpcsgd.server.listening import interface_addresses, listen, resolve


def test_addresses_end_with_the_loopback() -> None:
    found = list(interface_addresses().values())
    assert "127.0.0.1" in found and resolve([]) == found
    assert all(socket.inet_aton(address) for address in found)
    assert [a.startswith("127.") for a in found] == sorted(a.startswith("127.") for a in found)


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.0/8", "127.0.0.1/8", "lo"])
def test_address_network_and_interface_select_addresses(bind: str) -> None:
    assert resolve([bind]) == ["127.0.0.1"]
    assert resolve([bind, "127.0.0.1"]) == ["127.0.0.1"]  # each once


@pytest.mark.parametrize("bind", ["", "nowhere0", "198.51.100.0/24", "300.1.1.1", "127.0.0.1:80", "a\nb"])
def test_what_this_host_does_not_have_is_an_error_that_names_its_interfaces(bind: str) -> None:
    with pytest.raises(BadOption, match=r"expected one of .*lo \(127\.0\.0\.1\)"):
        resolve([bind])


def test_one_port_serves_all_addresses_and_no_other() -> None:
    listeners = listen(["127.0.0.1", "127.0.0.2"])
    ports = {listener.getsockname()[1] for listener in listeners}
    (port,) = ports
    for address in ("127.0.0.1", "127.0.0.2"):
        socket.create_connection((address, port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.3", port), timeout=5)
    for listener in listeners:
        assert not listener.getblocking()
        listener.close()


def test_address_of_another_host_is_an_error() -> None:
    with pytest.raises(BadOption, match=r"cannot listen at 198\.51\.100\.1"):
        listen(resolve(["198.51.100.1"]))
