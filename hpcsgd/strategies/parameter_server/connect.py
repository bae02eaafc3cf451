"""Connectors to the servers: ranks of the same job, or another job over TCP."""

from __future__ import annotations

import os
import secrets
import sys
import time
from pathlib import Path

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.world import World
from hpcsgd.server.connection import Connector
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.server.protocol import Handler, Link
from hpcsgd.server.reaching import reach_server
from hpcsgd.server.rendezvous import RendezvousFile
from hpcsgd.server.tcp_link import TCPLink

_FILE_POLL_INTERVAL = 0.2  # seconds


class MPIConnector:
    """Connector to a server that is a rank of the same job."""

    def __init__(self, communicator: Communicator, rank: int, number: int, traffic: Traffic) -> None:
        self._communicator, self._rank, self._number, self._traffic = communicator, rank, number, traffic
        self.server_name = f"the server on rank {rank}"

    def open(self, handler: Handler) -> Link:
        return MPILink(self._communicator, self._rank, self._number, handler, self.server_name, self._traffic)


class TCPConnector:
    """Connector to a server of another job, whose address is in a rendezvous file.

    The file is read again for every link, for a restarted server has another port.
    """

    def __init__(self, path: Path, index: int, traffic: Traffic) -> None:
        self._path, self._index, self._traffic = path, index, traffic
        self.server_name = f"server {index} of {path}"

    def open(self, handler: Handler) -> Link:
        file = RendezvousFile.read(self._path)
        if self._index >= len(file.servers):
            raise HpcsgdError(
                f"{self.server_name} does not exist",
                expected=f"at least {self._index + 1} servers",
                got=f"{len(file.servers)}",
                do="restart `hpcsgd serve` with as many ranks as before",
            )
        endpoint = file.servers[self._index]
        return TCPLink(reach_server(endpoint, file.secret), handler, self.server_name, self._traffic)


def make_connectors(path: Path, world: World) -> list[Connector]:
    """Make the connectors to the servers of a rendezvous file; collective.

    Waits for the file, since jobs may start in any order.

    Raises
    ------
    HpcsgdError
        On all ranks, if no file is written within the world's timeout, or if it is of another kind.
    """
    deadline = time.monotonic() + world.timeout
    if world.rank == 0 and not path.exists():
        line = f"hpcsgd: waiting up to {world.timeout:g} s for {path}, which the servers write"
        print(line, file=sys.stderr, flush=True)
    servers = 0
    while servers == 0:
        count = world.collectively(lambda: _count_servers(path, deadline) if world.rank == 0 else 0)
        servers = world.gather(count, "the number of servers")[0]
    return [TCPConnector(path, index, world.traffic) for index in range(servers)]


def _count_servers(path: Path, deadline: float) -> int:
    """Number of servers in a rendezvous file; 0 while there is no file."""
    try:
        return len(RendezvousFile.read(path).servers)
    except OSError as error:
        if time.monotonic() > deadline:
            raise HpcsgdError(
                f"no server has written {path}",
                got=str(error),
                do=f"start the servers: mpiexec -n 1 hpcsgd serve --listen {path}, with a path that all jobs "
                "can access; to wait longer raise --timeout or HPCSGD_TIMEOUT (seconds)",
            ) from None
        time.sleep(_FILE_POLL_INTERVAL)
        return 0


def group_name(world: World, seed: int) -> str:
    """Unique name of this job among the groups of a server, equal on all its ranks; collective.

    It begins with the seed, which differs between groups: servers add gradients up in the order of names, so
    that the order, and with it the bits of the sum, are those of the last run.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    parts = [
        f"seed{seed:04d}",
        *([f"job{job}"] if job else []),
        world.host,
        str(os.getpid()),
        secrets.token_hex(2),
    ]
    return str(world.gather("-".join(parts), "the name of the group")[0])
