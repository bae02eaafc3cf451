"""`hpcsgd bench push`: the rate of pushes and pulls between a client and a parameter server."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import devices, output
from hpcsgd.commands.bench.options import PushOptions
from hpcsgd.commands.bench.output import Column, Results, Timed, times
from hpcsgd.commands.serve.options import ServeOptions
from hpcsgd.commands.serve.service import Service
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.server import Policy, Server
from hpcsgd.server.connection import Connector
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.server.store import Store
from hpcsgd.strategies.parameter_server.connect import MPIConnector, TCPConnector
from hpcsgd.tensors.group import TensorGroup

_POLICY = Policy("elastic", alpha=0.5)
_TENSOR = 256 * 1024  # elements


@dataclass(frozen=True)
class PushResult(Timed):
    """One kind of request over one kind of link."""

    over: str
    request: str
    seconds: np.ndarray  # (repeats,)
    size: float  # bytes of the model

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.size / self.median


def _columns(options: PushOptions) -> list[Column[PushResult]]:
    columns: list[Column[PushResult]] = [
        Column(lambda r: r.over, "over", "over"),
        Column(lambda r: r.request, "request", "request"),
        Column(lambda _: options.mib, "mib"),
        *times(lambda r: r.seconds, form=".1f"),
        Column(lambda r: r.rate / 1e6, "mb_per_second", "MB/s", ".0f", 1),
    ]
    if (link := options.link_mbit) is not None:
        name, heading = "share_of_link", "share of the link"
        columns.append(Column(lambda r: 8e-6 * r.rate / link, name, heading, ".0%", 3))
    return columns


def main(options: PushOptions) -> None:
    """Time pushes and pulls on two ranks, of which the second is the server; rank 0 prints a table."""
    with devices.open_world(path=options.csv) as world:
        if world.size != 2:
            raise BadOption(
                "bench push measures one client and one server",
                expected="2 ranks",
                got=f"{world.size}",
                do="start it with mpiexec -n 2",
                everywhere=True,
            )
        mib, repeats = options.mib, options.repeats
        measured = {
            "MPI": _over_mpi(world, mib, repeats),
            "TCP, with log": _over_tcp(world, mib, repeats, options.listen, tls=False),
            "TLS, with log": _over_tcp(world, mib, repeats, options.listen, tls=True),
        }
        results = [
            PushResult(over, request, seconds, mib * 2**20)
            for over, requests in measured.items()
            for request, seconds in requests.items()
        ]
        title = f"{mib:g} MiB of float32 in buckets of 4 MiB, one server"
        notes = "Rates are per direction: push and pull transfers the model in both directions at once."
        table = Results(_columns(options), results, title, notes)
        if world.rank == 0:
            table.show()
            output.write_csv(options.csv, table.rows({}))


def _over_mpi(world: World, mib: float, repeats: int) -> dict[str, np.ndarray]:
    """Seconds per request between two ranks of a job."""
    alone, net = world.split(world.rank), world.control.dup("parameter server")
    seconds: dict[str, np.ndarray] = {}
    if world.rank == 0:
        seconds = _time_requests(alone, MPIConnector(net, 1, 0, world.traffic), mib, repeats)
    else:
        server = Server(_POLICY)
        server.add_link(MPILink(net, 0, 0, server, "rank 0", world.traffic))
        while server.links:
            world.waiter.until(lambda: server.pump(server.links) > 0, "requests of rank 0")
    alone.close()
    return seconds


def _over_tcp(world: World, mib: float, repeats: int, listen: Path, tls: bool) -> dict[str, np.ndarray]:
    """Seconds per request between two jobs, encrypted or not."""
    alone = world.split(world.rank)
    seconds: dict[str, np.ndarray] = {}
    if world.rank == 0:
        seconds = _time_requests(alone, TCPConnector(listen, 0, world.traffic), mib, repeats)
    else:
        from hpcsgd.commands.serve.dashboard import ServerDashboard
        from hpcsgd.commands.serve.persistence import ServerPersistence
        from hpcsgd.server.proof import new_secret

        options = ServeOptions(listen, _POLICY.mode, _POLICY.alpha, progress="off", tls=tls)
        folder = listen.with_name(f"{listen.name}.checkpoint")
        with ServerPersistence(folder, options.checkpoint_every) as state:
            Service(options, alone, state, new_secret(), ServerDashboard("off")).run()
        shutil.rmtree(folder)
    alone.close()
    return seconds


def _time_requests(world: World, connector: Connector, mib: float, repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each repeat of each request, (repeats,)."""
    count = max(1, round(mib * 2**20 / 4 / _TENSOR))
    tensors = [(str(i), torch.empty(_TENSOR, device="cpu")) for i in range(count)]
    model, reply = TensorGroup(world, tensors), TensorGroup(world, tensors)
    store = Store(world, [connector], "bench", {"model": model}, {"mode": _POLICY.mode})
    store.init("model", model).wait()
    requests: dict[str, Callable[[], object]] = {
        "push": lambda: store.push("model", model).wait(),
        "pull": lambda: store.pull("model", reply).wait(),
        "push and pull": lambda: store.pushpull("model", model, reply).wait(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    for repeat in range(repeats + 1):
        for name, request in requests.items():
            started = time.perf_counter()
            request()
            if repeat:  # the first one allocates memory
                seconds[name].append(time.perf_counter() - started)
    store.close()
    return {name: np.array(times) for name, times in seconds.items()}
