"""Addresses of a host whose interfaces have several, of both kinds, and of one without a network."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.lab.hosts import obstacle
from tests.support.markdown_pages import ROOT

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-")]
RESOLVE = """
from hpcsgd.server.listening import listen, resolve
found = resolve([])
print(*found)
ports = {listener.getsockname()[1] for listener in listen(found)}
assert len(ports) == 1
"""


def in_a_new_namespace(*commands: str) -> subprocess.CompletedProcess[str]:
    script = "; ".join(["set -e", *commands, '"$0" -c "$1"'])
    words = ["unshare", "--net", "bash", "-c", script, sys.executable, RESOLVE]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_secondary_addresses_and_those_of_ipv6_are_found() -> None:
    found = in_a_new_namespace(
        "ip link set lo up",
        "ip link add veth0 type veth peer veth1",
        "ip link set veth0 up; ip link set veth1 up",
        "ip addr add 10.9.0.1/24 dev veth0; ip addr add 10.9.0.2/24 dev veth0 label veth0:1",
        "ip addr add 2001:db8::5/64 dev veth0 nodad",
    )
    assert found.returncode == 0, found
    assert found.stdout.split() == ["10.9.0.1", "10.9.0.2", "2001:db8::5", "127.0.0.1", "::1"], found


@pytest.mark.parametrize("lo", ["up", "down"])
def test_host_without_a_network(lo: str) -> None:
    found = in_a_new_namespace(f"ip link set lo {lo}")
    if lo == "up":
        assert found.stdout.split()[0] == "127.0.0.1", found
    else:
        assert found.returncode != 0 and "has no network address" in found.stderr, found
