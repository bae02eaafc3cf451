"""How the servers are reached: as ranks of the same job, or over TCP in a job of their own."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.communicator import Transport
from hpcsgd.mpi.world import World
from hpcsgd.server import tcp_link
from hpcsgd.server.connection import Dial
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.server.protocol import Link, Party

_LOOK_EVERY = 0.2  # seconds


class RankDial:
    """Reaches a server that is a rank of the same job.

    Parameters
    ----------
    transport, rank, traffic
        See `MPILink`.
    """

    def __init__(self, transport: Transport, rank: int, traffic: Traffic) -> None:
        self._transport, self._rank, self._traffic = transport, rank, traffic
        self.server = f"the server on rank {rank}"

    def open(self, party: Party) -> tuple[Link, str]:
        return MPILink(self._transport, self._rank, party, self.server, self._traffic), ""


class FileDial:
    """Reaches a server of another job, which says in a file where it is.

    The file is read anew for every link: a server that was started again has another port.

    Parameters
    ----------
    path
        The file, see `ports.Meeting`.
    index
        Which of its servers.
    traffic
        See `Link`.
    """

    def __init__(self, path: Path, index: int, traffic: Traffic) -> None:
        self._path, self._index, self._traffic = path, index, traffic
        self.server = f"server {index} of {path}"

    def open(self, party: Party) -> tuple[Link, str]:
        meeting = tcp_link.Meeting.read(self._path)
        if self._index >= len(meeting.servers):
            raise HpcsgdError(
                f"there is no {self.server} any more",
                got=f"{len(meeting.servers)} servers",
                do="start as many servers as before",
            )
        connection = tcp_link.connect(*meeting.servers[self._index])
        return tcp_link.SocketLink(connection, party, self.server, self._traffic), meeting.secret


def dials(path: Path, world: World) -> list[Dial]:
    """How to reach the servers that a file names; collective. Waits for the file: jobs start in any order.

    Raises
    ------
    HpcsgdError
        On all ranks, where there is no such file before the world's deadline, or it is another kind of file.
    """
    give_up = time.monotonic() + world.timeout
    servers = 0
    while servers == 0:
        found = world.together(lambda: _servers(path, give_up) if world.rank == 0 else 0)
        servers = world.gather(found, "the number of servers")[0]
    return [FileDial(path, index, world.traffic) for index in range(servers)]


def _servers(path: Path, give_up: float) -> int:
    """How many a file names; 0: there is no file yet."""
    try:
        return len(tcp_link.Meeting.read(path).servers)
    except OSError as error:
        if time.monotonic() > give_up:
            raise HpcsgdError(
                f"no server has written {path}",
                got=str(error),
                do=f"start the servers: mpiexec -n 1 hpcsgd serve --listen {path}, where all jobs see the "
                "file; for a longer wait raise --timeout or HPCSGD_TIMEOUT (seconds)",
            ) from None
        time.sleep(_LOOK_EVERY)
        return 0


def group_name(world: World) -> str:
    """What this job is called among the groups of a server: like no other, and the same on all its ranks."""
    job = os.environ.get("SLURM_JOB_ID", "")
    parts = [*([f"job{job}"] if job else []), world.host, str(os.getpid()), secrets.token_hex(2)]
    return str(world.gather("-".join(parts), "the name of the group")[0])
