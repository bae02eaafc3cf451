"""Hosts with links that can be cut: network namespaces of this machine."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from functools import partial

from tests.faults.chaos.hand import Fault
from tests.lab.hosts import Hosts, launcher

_RATE = "1gbit"


class LinkedHosts:
    """Hosts, half of which are for ranks of one MPI job, and half for groups of servers; a context manager.

    Parameters
    ----------
    count
        Number of hosts, an even one.

    Attributes
    ----------
    ranks, groups
        Numbers of the hosts for ranks, and of those for groups.
    """

    def __init__(self, count: int) -> None:
        self._hosts = Hosts(count, _RATE)
        numbers = range(1, count + 1)
        self.ranks, self.groups = numbers[: count // 2], numbers[count // 2 :]

    def __enter__(self) -> LinkedHosts:
        with ExitStack() as stack:
            stack.enter_context(self._hosts)
            self._launcher = stack.enter_context(launcher(self._hosts.name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """The address of this machine on their network."""
        return f"{self._hosts.subnet}.254"

    @property
    def within(self) -> list[list[str]]:
        """For each host of groups: the command that starts a program there."""
        return [["ip", "netns", "exec", f"{self._hosts.name}-{number}"] for number in self.groups]

    @property
    def variables(self) -> dict[str, str]:
        """Variables by which MPICH's mpiexec starts a rank on each host of ranks."""
        addresses = self._hosts.addresses
        return {
            "HOSTS": ",".join(f"{addresses[number - 1]}:1" for number in self.ranks),
            "HYDRA_LAUNCHER": "ssh",
            "HYDRA_LAUNCHER_EXEC": str(self._launcher),
            "HYDRA_IFACE": self._hosts.name,
            "UCX_TLS": "tcp,self",
        }

    def cut(self, fault: Fault, some: range) -> partial[object]:
        """Cut the link of one of some hosts; returns what connects it again."""
        number = fault.pick(some)
        port = f"{self._hosts.name}p{number}"
        _link(port, "down")
        return partial(_link, port, "up")


def _link(port: str, state: str) -> None:
    subprocess.run(["ip", "link", "set", port, state], check=True)
