"""Where servers listen: addresses, networks and interfaces of their host, on one port."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from hpcsgd.errors import BadOption
from hpcsgd.server import listening
from hpcsgd.server.listening import interface_addresses, listen, resolve


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def test_addresses_end_with_the_loopback() -> None:
    found = [each.address for each in interface_addresses()]
    assert "127.0.0.1" in found and resolve([]) == resolve(["::"]) == found
    assert [is_loopback(each) for each in found] == sorted(is_loopback(each) for each in found)
    assert resolve(["0.0.0.0"]) == [each for each in found if ":" not in each]


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.0/8", "127.0.0.1/8"])
def test_address_and_network_select_addresses(bind: str) -> None:
    assert resolve([bind]) == ["127.0.0.1"]
    assert resolve([bind, "127.0.0.1"]) == ["127.0.0.1"]  # each once


def test_interface_selects_its_addresses() -> None:
    assert resolve(["lo"]) == [each for each in resolve([]) if is_loopback(each)]


@pytest.mark.parametrize(
    "bind",
    [
        "",
        "nowhere0",
        "198.51.100.0/24",
        "198.51.100.1",
        "300.1.1.1",
        "127.0.0.1:80",
        "a\nb",
        "224.0.0.1",
        "255.255.255.255",
        "ff02::1",
    ],
)
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


def test_address_that_has_gone_is_an_error() -> None:
    with pytest.raises(BadOption, match=r"cannot listen at 198\.51\.100\.1"):
        listen(["198.51.100.1"])


def test_host_without_addresses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "interface_addresses", list)
    with pytest.raises(BadOption, match="has no network address"):
        resolve([])
